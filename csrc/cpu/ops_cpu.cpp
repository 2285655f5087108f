// The CPU operators: checked call -> blocks of work on torch's thread pool -> kernels of the active ISA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/isa_dispatch.h"
#include "schedule.h"

namespace schedulefree {
namespace {

// Work is counted in elements; what a tensor costs apart from its elements weighs like this many.
constexpr std::int64_t kTensorWork = 64;

// Waking the pool costs microseconds. Less work than this is done at once.
constexpr std::int64_t kSerialWork = 32768;

// The blocks of all tensors of a call, counted through.
struct Blocks {
  std::vector<std::int64_t> first;  // of each tensor, and behind the last; empty tensors have none
  std::int64_t count = 0;
  std::int64_t work = 0;

  explicit Blocks(const StepPlan& plan) {
    first.reserve(plan.tensors.size() + 1);
    for (const TensorArgs& tensor : plan.tensors) {
      first.push_back(count);
      count += tensor.numel / kBlock + (tensor.numel % kBlock != 0);
      work += tensor.numel + kTensorWork;
    }
    first.push_back(count);
  }
};

// Runs `kernel(tensor, begin, n, block)` over all blocks of all tensors, split evenly over the threads: a
// tiny tensor is one block, a huge one many, and a thread may begin inside either.
template <typename Kernel>
void for_each_block(const StepPlan& plan, const Blocks& blocks, const Kernel& kernel) {
  if (blocks.count == 0) return;

  const auto run = [&](std::int64_t begin, std::int64_t end) {
    // The last tensor that begins at or before `begin`: empty ones before it begin at the same block.
    auto next = std::upper_bound(blocks.first.begin(), blocks.first.end(), begin);
    for (std::int64_t block = begin; block < end; ++next) {
      const std::int64_t tensor_end = std::min(*next, end);
      const auto index = static_cast<std::size_t>(next - blocks.first.begin()) - 1;
      const TensorArgs& tensor = plan.tensors[index];
      for (; block < tensor_end; ++block) {
        const std::int64_t offset = (block - blocks.first[index]) * kBlock;
        kernel(tensor, offset, std::min(kBlock, tensor.numel - offset), block);
      }
    }
  };
  if (blocks.work < kSerialWork) {
    run(0, blocks.count);
  } else {
    torch::stable::parallel_for(0, blocks.count, /*grain_size=*/1, run);
  }
}

template <typename Kernel>
void for_each_block(const StepPlan& plan, const Kernel& kernel) {
  for_each_block(
      plan, Blocks(plan),
      [&](const TensorArgs& t, std::int64_t begin, std::int64_t n, std::int64_t) { kernel(t, begin, n); });
}

void sgd_step_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const StepCall call = check_sgd_step(stack, Backend::kCpu);
  if (call.coefs.take == 0) return;
  const KernelTable& kernels = active_isa().kernel_table();
  const StepUpdate step(call.coefs, call.decay_at);
  for_each_block(call.plan, [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
    kernels.sgd_step(t, begin, n, step);
  });
}

void adamw_step_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const StepCall call = check_adamw_step(stack, Backend::kCpu);
  if (call.coefs.take == 0) return;
  const KernelTable& kernels = active_isa().kernel_table();
  const StepUpdate step(call.coefs, call.decay_at);
  for_each_block(call.plan, [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
    kernels.adamw_step(t, begin, n, step);
  });
}

void schedule_step_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const ScheduleCall call = check_schedule_step(stack, Backend::kCpu);
  const ScheduleArgs& args = call.args;
  ScheduleStep step;
  try {
    step = schedule_step(args.state(), *args.scheduled_lr, args.rule, args.inputs());
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(std::string("schedulefree_cpp::schedule_step_: ") + error.what());
  }
  args.store(step);
}

template <auto check>
void swap_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const SwapCall call = check(stack, Backend::kCpu);
  const KernelTable& kernels = active_isa().kernel_table();
  for_each_block(call.plan, [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
    kernels.swap(t, begin, n, call.swap);
  });
}

template <auto check, auto kernel>
void base_step_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const BaseStepCall call = check(stack, Backend::kCpu);
  if (call.coefs.take == 0) return;
  const KernelTable& kernels = active_isa().kernel_table();
  const BaseStepUpdate update{StepUpdate(call.coefs, DecayAt::kY), call.to_x, call.exchange};
  for_each_block(call.plan, [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
    (kernels.*kernel)(t, begin, n, update);
  });
}

template <typename T>
T* data_of(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

struct PolyakSums {
  double absolute = 0;
  double inner = 0;

  PolyakSums operator+(const PolyakSums& other) const {
    return {absolute + other.absolute, inner + other.inner};
  }
};

// Adds in pairs of pairs: the error grows with the logarithm of their number.
template <typename T>
T sum_of(const T* values, std::size_t n) {
  if (n == 0) return T{};
  if (n == 1) return *values;
  return sum_of(values, n / 2) + sum_of(values + n / 2, n - n / 2);
}

// Sums what `kernel(tensor, begin, n)` returns for every block, in an order that no thread changes.
template <typename T, typename Kernel>
T sum_over_blocks(const StepPlan& plan, const Kernel& kernel) {
  const Blocks blocks(plan);
  std::vector<T> partial(static_cast<std::size_t>(blocks.count));
  for_each_block(plan, blocks,
                 [&](const TensorArgs& t, std::int64_t begin, std::int64_t n, std::int64_t block) {
                   partial[static_cast<std::size_t>(block)] = kernel(t, begin, n);
                 });
  return sum_of(partial.data(), partial.size());
}

void polyak_sums_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const ReductionCall call = check_polyak_sums(stack, Backend::kCpu);
  const KernelTable& kernels = active_isa().kernel_table();
  const auto total =
      sum_over_blocks<PolyakSums>(call.plan, [&](const TensorArgs& t, std::int64_t begin, std::int64_t n) {
        double sums[2];
        kernels.polyak_sums(t, begin, n, sums);
        return PolyakSums{sums[0], sums[1]};
      });
  const torch::stable::Tensor sums = new_vector(2, ScalarType::Double);
  data_of<double>(sums)[0] = total.absolute;
  data_of<double>(sums)[1] = total.inner;
  stack[0] = torch::stable::detail::from(sums);
}

void grad_norm_cpu(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const ReductionCall call = check_grad_norm(stack, Backend::kCpu);
  const double squares = sum_over_blocks<double>(call.plan, active_isa().kernel_table().sum_squares);
  const torch::stable::Tensor norm = new_scalar(ScalarType::Double);
  *data_of<double>(norm) = std::sqrt(squares);
  stack[0] = torch::stable::detail::from(norm);
}

}  // namespace
}  // namespace schedulefree

STABLE_TORCH_LIBRARY_IMPL(schedulefree_cpp, CPU, m) {
  m.impl("sgd_step_", &schedulefree::sgd_step_cpu);
  m.impl("adamw_step_", &schedulefree::adamw_step_cpu);
  m.impl("schedule_step_", &schedulefree::schedule_step_cpu);
  m.impl("y_to_x_", &schedulefree::swap_cpu<schedulefree::check_y_to_x>);
  m.impl("x_to_y_", &schedulefree::swap_cpu<schedulefree::check_x_to_y>);
  m.impl("before_base_step_", &schedulefree::base_step_cpu<schedulefree::check_before_base_step,
                                                           &schedulefree::KernelTable::before_base_step>);
  m.impl("after_base_step_", &schedulefree::base_step_cpu<schedulefree::check_after_base_step,
                                                          &schedulefree::KernelTable::after_base_step>);
  m.impl("polyak_sums", &schedulefree::polyak_sums_cpu);
  m.impl("grad_norm", &schedulefree::grad_norm_cpu);
}
