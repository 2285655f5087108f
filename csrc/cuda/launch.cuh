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

// Blocks that a multiprocessor holds at least, which bounds the registers of a thread, and vectors of each
// stream that a thread has in flight. From compute capability 9.0 on memory is faster by more than its
// threads are more. Scalars that the host knows are read from the constant bank; `captured` ones take
// registers.
template <typename Op, bool captured>
struct Occupancy {
  static constexpr bool kDouble = sizeof(typename Op::Real) == 8;
  static constexpr bool kMany = captured || Op::kStreams > 5;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static constexpr int kBlocks = kDouble ? 2 : kMany ? 3 : 4;
  static constexpr int kUnroll = !kDouble && !captured && Op::kStreams <= 4 ? 2 : 1;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  static constexpr int kBlocks = kDouble ? 2 : kMany ? 3 : 5;
  static constexpr int kUnroll = 1;
#else
  static constexpr int kBlocks = kDouble ? 2 : kMany ? 3 : 4;
  static constexpr int kUnroll = 1;
#endif
};

template <typename Op, typename Table>
__device__ __forceinline__ typename Table::Piece piece_of(const Table& table, std::uint32_t chunk) {
  int element_sizes[Op::kStreams];
  Op::element_sizes(element_sizes);
  return table.piece(chunk, element_sizes);
}

template <typename Op, typename Table>
__global__ void __launch_bounds__(kThreads, Occupancy<Op, false>::kBlocks)
    update_kernel(const __grid_constant__ Table table, const __grid_constant__ typename Op::Args args) {
  update_piece<Occupancy<Op, false>::kUnroll, Op>(args, piece_of<Op>(table, blockIdx.x),
                                                  static_cast<std::int32_t>(threadIdx.x));
}

// A step with scalars that are on the device, or of a tensor with gaps.
template <typename Op, typename Table>
__global__ void __launch_bounds__(kThreads, Occupancy<Op, true>::kBlocks)
    captured_step_kernel(const __grid_constant__ Table table, const __grid_constant__ StepSource source) {
  typename Op::Args args;
  if (!resolve(source, args)) return;
  update_piece<Occupancy<Op, true>::kUnroll, Op>(args, piece_of<Op>(table, blockIdx.x),
                                                 static_cast<std::int32_t>(threadIdx.x));
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
  const auto total = block_total<kThreads>(
      sum_piece<Op>(args, piece_of<Op>(table, blockIdx.x), static_cast<std::int32_t>(threadIdx.x)));
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

// How many elements of each block's piece a swap is going to lose.
template <typename Op, typename Table>
__global__ void __launch_bounds__(kThreads)
    count_lost_kernel(const __grid_constant__ Table table, const __grid_constant__ typename Op::Args args,
                      std::int64_t* lost) {
  const auto piece = piece_of<Op>(table, blockIdx.x);
  Sums<1> own = {};
  for (std::int32_t i = static_cast<std::int32_t>(threadIdx.x) * kVector; i < piece.size;
       i += kThreads * kVector) {
    typename Op::Values values;
    Op::load_values(piece, i, values, args);
    own.at[0] += values.lost;
  }
  const Sums<1> total = block_total<kThreads>(own);
  if (threadIdx.x == 0) lost[blockIdx.x] = static_cast<std::int64_t>(total.at[0]);
}

// Swaps, and writes what is lost from the place on that `first` has for each block.
template <typename Op, typename Table>
__global__ void __launch_bounds__(kThreads, 2)
    keep_kernel(const __grid_constant__ Table table, const __grid_constant__ typename Op::Args args,
                const std::int64_t* first, std::int64_t* at, double* value) {
  __shared__ std::int32_t before[kThreads];
  const auto piece = piece_of<Op>(table, blockIdx.x);
  const auto thread = static_cast<std::int32_t>(threadIdx.x);
  std::int64_t next = first[blockIdx.x];
  for (std::int32_t row = 0; row < piece.size; row += kThreads * kVector) {
    typename Op::Values values;
    Op::load_values(piece, row + thread * kVector, values, args);
    // Inclusive sums over the threads.
    before[thread] = values.lost;
    for (std::int32_t reach = 1; reach < kThreads; reach *= 2) {
      __syncthreads();
      const std::int32_t sum = thread >= reach ? before[thread - reach] : 0;
      __syncthreads();
      before[thread] += sum;
    }
    __syncthreads();
    const std::int64_t own = next + before[thread] - values.lost;
    next += before[kThreads - 1];
    Op::finish(piece, row + thread * kVector, values, args, at + own, value + own);
    __syncthreads();
  }
}

template <typename Op, typename Table>
__global__ void __launch_bounds__(kThreads)
    restore_kernel(const __grid_constant__ Table table, const __grid_constant__ typename Op::Args args) {
  const auto piece = piece_of<Op>(table, blockIdx.x);
  const auto whole = table.whole(blockIdx.x);
  for (auto i = static_cast<std::int32_t>(threadIdx.x); i < piece.size; i += kThreads)
    Op::restore(piece, whole, i, args);
}

// ---- dtypes to types -------------------------------------------------------------------------------

// Calls `call(Y())` with the storage of a batch's parameters.
template <typename Call>
void with_parameter(const Batch& batch, const Call& call) {
  if (batch.y == DType::kFloat32) {
    call(Float32{});
  } else if (batch.y == DType::kFloat64) {
    call(Float64{});
  } else if (batch.has_low) {
    call(SplitFloat{});
  } else {
    call(Half{});
  }
}

// Calls `call(Y(), Grad())` with the storage of a batch's parameters and gradients.
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

// Calls `call(Grad())` with the storage of a batch's gradients.
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

// A thread that waits for memory needs others to take its place.
inline std::int64_t resident_blocks(std::int32_t device) {
  int multiprocessors = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return std::int64_t{multiprocessors} * 4;
}

// Calls `visit(table)` for every launch that the items of a batch take.
template <typename Op, typename Visit>
void for_each_launch(const std::vector<Item<Op::kStreams>>& items, bool dense, std::int64_t chunk, bool peels,
                     const Visit& visit) {
  if (items.empty()) return;
  if (!dense) return visit_strided<Op>(items, chunk, visit);
  if constexpr (kCompilesLargeArguments) {
    if (takes_large_arguments()) return visit_dense<Op, kLargeArguments>(items, chunk, peels, visit);
  }
  if constexpr (kCompilesSmallArguments) visit_dense<Op, kSmallArguments>(items, chunk, peels, visit);
}

// The chunk size for a batch.
inline std::int64_t chunk_of(const StepPlan& plan, const Batch& batch) {
  std::vector<std::int64_t> numels;
  for (const std::size_t i : batch.tensors) numels.push_back(plan.tensors[i].numel);
  return choose_chunk(numels, resident_blocks(batch.device));
}

// Swaps the parameters of a batch.
template <typename Op>
void launch_swap(const StepPlan& plan, const Batch& batch, const typename Op::Args& args,
                 cudaStream_t stream) {
  for_each_launch<Op>(items_of<Op>(plan, batch), batch.dense, chunk_of(plan, batch), /*peels=*/true,
                      [&](const auto& table) {
                        update_kernel<Op><<<table.chunks, kThreads, 0, stream>>>(table, args);
                        check_cuda(cudaGetLastError());
                      });
}

// Numbers on one device, brought to others as they are needed.
class Numbers {
 public:
  Numbers(const double* data, std::int64_t count, std::int32_t home)
      : data_(data), count_(count), home_(home) {}

  // Their address on a device.
  const double* on(const OnDevice& device, std::int32_t index) {
    if (data_ == nullptr || index == home_) return data_;
    OnDevice(home_).synchronize();
    copies_.push_back(new_vector(count_, ScalarType::Double, DeviceType::CUDA));
    auto* const copy = static_cast<double*>(copies_.back().data_ptr());
    check_cuda(cudaMemcpyAsync(copy, data_, static_cast<std::size_t>(count_) * sizeof(double),
                               cudaMemcpyDefault, device.stream()));
    return copy;
  }

 private:
  const double* data_;
  std::int64_t count_;
  std::int32_t home_;
  std::vector<torch::stable::Tensor> copies_;
};

// Calls `launch(batch, source, stream)` for every batch of a checked step, on its device.
template <typename Launch>
void for_each_step_batch(const SgdCall& call, const AdamScalars& adam, const Launch& launch) {
  const std::int32_t home = call.tensors.empty() ? -1 : call.tensors.front().get_device_index();
  StepSource source;
  source.step = call.step;
  source.adam = adam;
  source.max_grad_norm = call.max_grad_norm;
  const bool norm_on_cpu = call.grad_norm.data != nullptr && call.grad_norm.on_cpu;
  if (norm_on_cpu) source.step.grad_mul *= clip_factor(value_or(call.grad_norm, 0), call.max_grad_norm);
  Numbers coefs(call.coefs, kStepCoefficients, home);
  Numbers grad_norm(norm_on_cpu ? nullptr : static_cast<const double*>(call.grad_norm.data), 1, home);
  for (const Batch& batch : batches_of(call.plan)) {
    const OnDevice device(batch.device);
    source.coefs = coefs.on(device, batch.device);
    source.grad_norm = grad_norm.on(device, batch.device);
    source.y_fp16 = batch.y == DType::kFloat16;
    source.grad_fp16 = batch.grad == DType::kFloat16;
    launch(batch, source, device.stream());
  }
}

// Takes the step of a batch.
template <typename Op>
void launch_step(const StepPlan& plan, const Batch& batch, const StepSource& source, cudaStream_t stream) {
  for_each_launch<Op>(
      items_of<Op>(plan, batch), batch.dense, chunk_of(plan, batch), /*peels=*/true, [&](const auto& table) {
        using Table = std::decay_t<decltype(table)>;
        if constexpr (Table::kDense) {
          if (source.known_to_host()) {
            const typename Op::Args args(source.step, source.adam, source.y_fp16, source.grad_fp16);
            update_kernel<Op><<<table.chunks, kThreads, 0, stream>>>(table, args);
            check_cuda(cudaGetLastError());
            return;
          }
        }
        captured_step_kernel<Op><<<table.chunks, kThreads, 0, stream>>>(table, source);
        check_cuda(cudaGetLastError());
      });
}

}  // namespace schedulefree
