// The CUDA operators, by their boxed arguments.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>

namespace schedulefree {

void sgd_step_cuda(StableIValue* stack, std::uint64_t, std::uint64_t);
void adamw_step_cuda(StableIValue* stack, std::uint64_t, std::uint64_t);
void schedule_step_cuda(StableIValue* stack, std::uint64_t, std::uint64_t);
void y_to_x_cuda(StableIValue* stack, std::uint64_t, std::uint64_t);
void x_to_y_cuda(StableIValue* stack, std::uint64_t, std::uint64_t);
void polyak_sums_cuda(StableIValue* stack, std::uint64_t, std::uint64_t);
void grad_norm_cuda(StableIValue* stack, std::uint64_t, std::uint64_t);

}  // namespace schedulefree
