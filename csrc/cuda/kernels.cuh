// The kernels. The library carries their sources, and NVRTC compiles each when it is first used
// (kernel_cache.h): for the formats of a call, for the options that the host knows of it, and for the GPU
// that is there.
#pragma once

#include "cuda/multi_tensor.h"
#include "cuda/updates.cuh"
#include "schedule_math.h"

namespace schedulefree {

// The largest of what the threads of a warp have.
__device__ __forceinline__ std::uint32_t largest_of_warp(std::uint32_t own) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  for (int apart = 16; apart > 0; apart /= 2) own = larger(own, __shfl_xor_sync(0xFFFFFFFFu, own, apart));
  return own;
#else
  return __reduce_max_sync(0xFFFFFFFFu, own);
#endif
}

// The scalars are asked for once the loads are under way.
template <typename Op, typename Table>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ Table table, const __grid_constant__ typename Op::Source source) {
  const auto piece = table.template piece<Op::kStreams>(blockIdx.x);
  const std::int32_t i = static_cast<std::int32_t>(threadIdx.x) * kVector, left = piece.size - i;
  Op op;
  op.load(piece, i, left);
  const auto* const scalars = source.get();
  if (scalars == nullptr) return;
  std::uint32_t largest = op.update(piece.begin + i, *scalars);
  if constexpr (Op::kShares) largest = largest_of_warp(largest);
  op.store(piece, i, left, piece.begin + i, largest, *scalars);
}

// The scalars of a step that is captured, computed by one thread for all blocks of the launches that follow.
template <typename Real>
__global__ void resolve_kernel(const double* coefs, ResolvedStep<Real>* step) {
  const StepCoefficients read = step_coefficients(coefs);
  step->take = read.take != 0;
  step->scalars = StepScalars<Real>(read);
}

// The total of what the threads of a block have, in thread 0, added in pairs of pairs.
template <int threads, int sums>
__device__ __forceinline__ Totals<sums> block_total(const Totals<sums>& own) {
  __shared__ Totals<sums> totals[threads];
  totals[threadIdx.x] = own;
  for (unsigned width = threads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) totals[threadIdx.x].add(totals[threadIdx.x + width]);
  }
  return totals[0];
}

// One total of every block.
template <typename Op, typename Table>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const __grid_constant__ Table table, Totals<Op::kSums>* totals) {
  const auto piece = table.template piece<Op::kStreams>(blockIdx.x);
  Totals<Op::kSums> own = {};
  for (std::int32_t i = static_cast<std::int32_t>(threadIdx.x) * kVector; i < piece.size;
       i += kThreads * kVector)
    Op::add(piece, i, piece.size - i, own);
  const Totals<Op::kSums> total = block_total<kThreads>(own);
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

// The total of all, by one block.
template <int sums, bool root>
__global__ void __launch_bounds__(kTotalThreads)
    total_kernel(const Totals<sums>* totals, std::int64_t count, Totals<sums>* result) {
  Totals<sums> own = {};
  for (std::int64_t i = threadIdx.x; i < count; i += kTotalThreads) own.add(totals[i]);
  Totals<sums> total = block_total<kTotalThreads>(own);
  if (threadIdx.x != 0) return;
  if (root) total.at[0] = sqrt(total.at[0]);
  *result = total;
}

// `host` has the inputs that the host has read, and the defaults of those that are absent.
template <StepKind kind>
__global__ void schedule_step_kernel(const __grid_constant__ ScheduleArgs args,
                                     const __grid_constant__ StepInputs host) {
  const auto read = [](const ScalarInput& input, double known) {
    return value_or(input.on_cpu ? ScalarInput{} : input, known);
  };
  const StepInputs inputs = {read(args.lr, host.lr), read(args.weight_decay, host.weight_decay),
                             read(args.grad_norm, host.grad_norm), read(args.grad_scale, host.grad_scale),
                             read(args.found_inf, host.found_inf)};
  StepRule rule = args.rule;
  rule.kind = kind;
  args.store(detail::schedule_step_unchecked(args.state(), *args.scheduled_lr, rule, inputs));
}

}  // namespace schedulefree
