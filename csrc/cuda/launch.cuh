// The kernels, and how a batch of tensors becomes launches of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cuda/step_kernel.h"
#include "cuda/stream.h"
#include "cuda/tables.h"
#include "stable_compat.h"

namespace schedulefree {

// ---- kernels ---------------------------------------------------------------------------------------

// The largest of what the threads of a warp have.
__device__ __forceinline__ std::uint32_t largest_of_warp(std::uint32_t own) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(0xFFFFFFFFu, own);
#else
  for (int apart = 16; apart > 0; apart /= 2) own = larger(own, __shfl_xor_sync(0xFFFFFFFFu, own, apart));
  return own;
#endif
}

// `scalars` gives the address of an Op's Args, or null where nothing is to be updated, to all threads alike;
// it is called once the loads are under way.
template <typename Op, typename Table, typename Scalars>
__device__ __forceinline__ void update_chunk(const Table& table, const Scalars& scalars) {
  int element_sizes[Op::kStreams];
  Op::element_sizes(element_sizes);
  const auto piece = table.piece(blockIdx.x, element_sizes);
  Share<Op, kVector> share;
  share.load(piece, static_cast<std::int32_t>(threadIdx.x));
  const typename Op::Args* const args = scalars();
  if (args == nullptr) return;
  std::uint32_t largest = share.update(piece, *args);
  if constexpr (Op::kShares) largest = largest_of_warp(largest);
  share.store(piece, largest, *args);
}

// With scalars that the host knows: operands from the constant bank.
template <typename Op, typename Table>
__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ Table table, const __grid_constant__ typename Op::Args args) {
  update_chunk<Op>(table, [&] { return &args; });
}

// A step with scalars that are on the device, or of a tensor with gaps. A block computes them once: in the
// registers of every thread they would leave too few.
template <typename Op, typename Table>
__global__ void __launch_bounds__(kThreads)
    captured_step_kernel(const __grid_constant__ Table table, const __grid_constant__ StepSource source) {
  using Args = typename Op::Args;
  __shared__ alignas(Args) unsigned char memory[sizeof(Args)];  // Args have defaults, shared memory has none
  __shared__ bool take;
  Args& args = *reinterpret_cast<Args*>(memory);
  update_chunk<Op>(table, [&]() -> const Args* {
    if (threadIdx.x == 0) take = resolve(source, args);
    __syncthreads();
    return take ? &args : nullptr;
  });
}

// The total of what the threads of a block have, in thread 0, added in pairs of pairs.
template <int threads, typename Total>
__device__ __forceinline__ Total block_total(const Total& own) {
  __shared__ Total totals[threads];
  totals[threadIdx.x] = own;
  for (unsigned width = threads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) totals[threadIdx.x].add(totals[threadIdx.x + width]);
  }
  __syncthreads();
  return totals[0];
}

// One total of every block.
template <typename Op, typename Table>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const __grid_constant__ Table table, const __grid_constant__ typename Op::Args args,
               typename Op::Total* totals) {
  int element_sizes[Op::kStreams];
  Op::element_sizes(element_sizes);
  const auto total = block_total<kThreads>(
      sum_piece<Op>(args, table.piece(blockIdx.x, element_sizes), static_cast<std::int32_t>(threadIdx.x)));
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
}

constexpr int kTotalThreads = 1024;

// The total of all, by one block.
template <typename Total, bool root>
__global__ void __launch_bounds__(kTotalThreads)
    total_kernel(const Total* totals, std::int64_t count, Total* result) {
  Total own = {};
  for (std::int64_t i = threadIdx.x; i < count; i += kTotalThreads) own.add(totals[i]);
  Total total = block_total<kTotalThreads>(own);
  if (threadIdx.x != 0) return;
  if (root) total.at[0] = sqrt(total.at[0]);
  *result = total;
}

// ---- dtypes to types -------------------------------------------------------------------------------

// Calls `call(Y())` with the format of a batch's parameters.
template <typename Call>
void with_parameter(const Batch& batch, const Call& call) {
  if (batch.y == DType::kFloat32) {
    call(Float32{});
  } else if (batch.y == DType::kFloat64) {
    call(Float64{});
  } else if (batch.y == DType::kFloat16) {
    call(SplitFp16{});
  } else if (batch.y_lo == DType::kInt8) {
    call(Split24{});
  } else {
    call(SplitBf16{});
  }
}

// Calls `call(Y(), Grad())` with the formats of a batch's parameters and gradients.
template <typename Call>
void with_parameter_and_gradient(const Batch& batch, const Call& call) {
  with_parameter(batch, [&](auto y) {
    if constexpr (sizeof(typename decltype(y)::Real) == 8) {
      call(y, Float64{});
    } else if (batch.grad == DType::kFloat32) {
      call(y, Float32{});
    } else {
      call(y, Half{});
    }
  });
}

// Calls `call(Grad())` with the format of a batch's gradients.
template <typename Call>
void with_gradient(const Batch& batch, const Call& call) {
  if (batch.grad == DType::kFloat32) {
    call(Float32{});
  } else if (batch.grad == DType::kFloat64) {
    call(Float64{});
  } else {
    call(Half{});
  }
}

// ---- launches --------------------------------------------------------------------------------------

// Drivers before 12.1 refuse large arguments. A toolkit of 13 runs with none of them, and one before 12.1
// compiles no large arguments.
#if CUDART_VERSION >= 13000
inline bool takes_large_arguments() { return true; }
#elif CUDART_VERSION >= 12010
inline bool takes_large_arguments() {
  int driver = 0;
  check_cuda(cudaDriverGetVersion(&driver));
  return driver >= 12010;
}
#else
inline bool takes_large_arguments() { return false; }
#endif
constexpr bool kCompilesLargeArguments = CUDART_VERSION >= 12010;
constexpr bool kCompilesSmallArguments = CUDART_VERSION < 13000;

// Calls `visit(table)` for every launch that a batch takes.
template <typename Op, typename Visit>
void for_each_launch(const StepPlan& plan, const Batch& batch, std::int64_t chunk, const Visit& visit) {
  if (!batch.dense) return visit_strided<Op>(plan, batch, chunk, visit);
  if constexpr (kCompilesLargeArguments) {
    if (takes_large_arguments()) return visit_dense<Op, kLargeArguments>(plan, batch, chunk, visit);
  }
  if constexpr (kCompilesSmallArguments) visit_dense<Op, kSmallArguments>(plan, batch, chunk, visit);
}

// The coefficients of a step, brought to those devices that do not have them.
class DeviceCoefs {
 public:
  explicit DeviceCoefs(const StepCall& call)
      : data_(call.device_coefs), home_(data_ ? call.coefs_tensor.get_device_index() : -1) {}

  // Their address on a device; null where the host knows them.
  const double* on(const OnDevice& device, std::int32_t index) {
    if (data_ == nullptr || index == home_) return data_;
    OnDevice(home_).synchronize();
    copies_.push_back(new_vector(kStepCoefficients, ScalarType::Double, DeviceType::CUDA));
    auto* const copy = static_cast<double*>(copies_.back().data_ptr());
    check_cuda(cudaMemcpyAsync(copy, data_, sizeof(StepCoefficients), cudaMemcpyDefault, device.stream()));
    return copy;
  }

 private:
  const double* data_;
  std::int32_t home_;
  std::vector<torch::stable::Tensor> copies_;
};

// Calls `launch(batch, source, stream)` for every batch of a checked step, on its device.
template <typename Launch>
void for_each_step_batch(const StepCall& call, const Launch& launch) {
  if (call.device_coefs == nullptr && call.coefs.take == 0) return;
  DeviceCoefs device_coefs(call);
  StepSource source;
  source.coefs = call.coefs;
  source.decay_at = call.decay_at;
  for (const Batch& batch : batches_of(call.plan)) {
    const OnDevice device(batch.device);
    source.device_coefs = device_coefs.on(device, batch.device);
    source.grad_fp16 = batch.grad == DType::kFloat16;
    launch(batch, source, device.stream());
  }
}

// Takes the step of a batch.
template <typename Op>
void launch_step(const StepPlan& plan, const Batch& batch, const StepSource& source, cudaStream_t stream) {
  typename Op::Args args;
  const bool known_to_host = source.device_coefs == nullptr && resolve(source, args);
  for_each_launch<Op>(plan, batch, kUpdateChunk, [&](const auto& table) {
    const auto launch = [&](auto* kernel, const auto& scalars) {
      kernel<<<table.chunks, kThreads, 0, stream>>>(table, scalars);
      check_cuda(cudaGetLastError());
    };
    using Table = std::decay_t<decltype(table)>;
    if constexpr (Table::kDense) {
      if (known_to_host) return launch(&update_kernel<Op, Table>, args);
    }
    launch(&captured_step_kernel<Op, Table>, source);
  });
}

}  // namespace schedulefree
