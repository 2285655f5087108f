// The CPU operators: checked call -> blocks of work on torch's thread pool -> kernels of the active ISA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "checks.h"
#include "cpu/isa_dispatch.h"

namespace schedulefree {
namespace {

// Work is counted in elements; what a tensor costs apart from its elements weighs like this many.
constexpr std::int64_t kTensorWork = 64;

// Waking the pool costs microseconds. Less work than this is done at once.
constexpr std::int64_t kSerialWork = 32768;

// Runs `kernel(tensor, begin, n)` over all blocks of all tensors, split evenly over the threads: a tiny
// tensor is one block, a huge one many, and a thread may begin inside either.
template <typename Kernel>
void for_each_block(const StepPlan& plan, const Kernel& kernel) {
  std::vector<std::int64_t> first_block;  // of each tensor; empty tensors have none
  first_block.reserve(plan.tensors.size() + 1);
  std::int64_t blocks = 0;
  std::int64_t work = 0;
  for (const TensorArgs& tensor : plan.tensors) {
    first_block.push_back(blocks);
    blocks += tensor.numel / kBlock + (tensor.numel % kBlock != 0);
    work += tensor.numel + kTensorWork;
  }
  if (blocks == 0) return;
  first_block.push_back(blocks);

  const auto run = [&](std::int64_t begin, std::int64_t end) {
    // The last tensor that begins at or before `begin`: empty ones before it begin at the same block.
    auto next = std::upper_bound(first_block.begin(), first_block.end(), begin);
    for (std::int64_t block = begin; block < end; ++next) {
      const std::int64_t tensor_end = std::min(*next, end);
      const auto index = static_cast<std::size_t>(next - first_block.begin()) - 1;
      const TensorArgs& tensor = plan.tensors[index];
      for (; block < tensor_end; ++block) {
        const std::int64_t offset = (block - first_block[index]) * kBlock;
        kernel(tensor, offset, std::min(kBlock, tensor.numel - offset));
      }
    }
  };
  if (work < kSerialWork) {
    run(0, blocks);
  } else {
    torch::stable::parallel_for(0, blocks, /*grain_size=*/1, run);
  }
}

void sgd_step_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const SgdCall call = check_sgd_step(stack, Backend::kCpu);
  const KernelTable& kernels = active_isa().kernel_table();
  for_each_block(call.plan, [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
    kernels.sgd_step(t, begin, n, call.step);
  });
}

void adamw_step_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const AdamwCall call = check_adamw_step(stack, Backend::kCpu);
  const KernelTable& kernels = active_isa().kernel_table();
  for_each_block(call.plan, [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
    kernels.adamw_step(t, begin, n, call.step, call.adam);
  });
}

template <auto check>
void swap_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const SwapCall call = check(stack, Backend::kCpu);
  const KernelTable& kernels = active_isa().kernel_table();
  for_each_block(call.plan, [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
    kernels.swap(t, begin, n, call.swap);
  });
}

}  // namespace
}  // namespace schedulefree

STABLE_TORCH_LIBRARY_IMPL(schedulefree_cpp, CPU, m) {
  m.impl("sgd_step_", &schedulefree::sgd_step_cpu);
  m.impl("adamw_step_", &schedulefree::adamw_step_cpu);
  m.impl("y_to_x_", &schedulefree::swap_cpu<schedulefree::check_y_to_x>);
  m.impl("x_to_y_", &schedulefree::swap_cpu<schedulefree::check_x_to_y>);
}
