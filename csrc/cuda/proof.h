// Whether a kernel gives the bits of the CPU kernel on the GPU that is going to run it. Plain C++ without
// torch.
//
// Nobody can try every compiler with every GPU, and some have compiled the ends of tensors wrongly.
#pragma once

#include <string>

#include "cuda/driver.h"
#include "cuda/kernel_id.h"

namespace schedulefree::cuda {

// Runs a loaded kernel over small tensors and compares every byte with what the CPU makes of them, all NaNs
// being one: ends of every length, streams that are not aligned, several tensors, gaps, values beside every
// rounding boundary, infinities and NaNs, and scalars that all differ. The context of the device is current.
//
// Uses memory of the driver and a stream of its own; torch's stream, allocator and random numbers are not
// touched. Returns the first difference in words, or nothing where there is none. Throws std::runtime_error
// where the driver fails.
std::string prove(const KernelId& id, Handle function);

}  // namespace schedulefree::cuda
