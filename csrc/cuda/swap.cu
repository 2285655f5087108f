#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda/ops_cuda.h"

namespace schedulefree {
namespace {

void swap_all(const SwapCall& call) {
  for (const Batch& batch : batches_of(call.plan)) {
    const OnDevice device(batch.device);
    const auto swap = [&](auto y) {
      using Op = Swap<decltype(y)>;
      for_each_launch<Op>(call.plan, batch, kUpdateChunk, [&](const auto& table) {
        update_kernel<Op><<<table.chunks, kThreads, 0, device.stream()>>>(table, call.swap);
        check_cuda(cudaGetLastError());
      });
    };
    if (batch.y_lo == batch.y && batch.y == DType::kBFloat16) {
      swap(Bf16{});
    } else if (batch.y_lo == batch.y && batch.y == DType::kFloat16) {
      swap(Fp16{});
    } else {
      with_parameter(batch, swap);
    }
  }
}

}  // namespace

void y_to_x_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  swap_all(check_y_to_x(stack, Backend::kCuda));
}

void x_to_y_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  swap_all(check_x_to_y(stack, Backend::kCuda));
}

}  // namespace schedulefree
