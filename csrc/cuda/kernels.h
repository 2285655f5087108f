// Kernels that may be launched: compiled or read from disk, loaded, and proved on the GPU that runs them.
// Plain C++ without torch.
#pragma once

#include <string>

#include "cuda/driver.h"
#include "cuda/kernel_id.h"

namespace schedulefree::cuda {

// The CUfunction of a kernel on a device. The first call in a process reads the kernel from disk, or compiles
// and keeps it; and has it proved (proof.h) where that has not been done on such a GPU with such a driver.
//
// Throws std::runtime_error where the proof fails, now and at every later call; and while `stream` is
// captured, during which nothing may be loaded, for a kernel that is not there yet.
Handle kernel_on(const Device& device, const KernelId& id, Handle stream);

// Launches `function` with the addresses of its arguments.
template <typename... Arguments>
void launch(Handle function, unsigned blocks, unsigned threads, Handle stream, Arguments*... arguments) {
  void* addresses[] = {const_cast<void*>(static_cast<const void*>(arguments))...};
  driver().cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, addresses, nullptr);
}

// Compiles a kernel for an architecture and keeps it on disk. Returns false where it was there.
bool compile_ahead(const KernelId& id, const std::string& architecture);

// Tables are as large as the driver and NVRTC allow.
TableKind largest_table();

// Called with a line of text, from any thread, when this process has compiled its first kernel.
void set_log(void (*log)(const char* line));

}  // namespace schedulefree::cuda
