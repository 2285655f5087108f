#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda/ops_cuda.h"

namespace schedulefree {
namespace {

// Elements per partial sum. The same for every GPU, and so are the sums.
constexpr std::int64_t kSumChunk = 8192;

// The total over one device, there.
template <typename Total, typename Launch>
torch::stable::Tensor total_on_device(const StepPlan& plan, const std::vector<const Batch*>& batches,
                                      cudaStream_t stream, const Launch& launch) {
  constexpr std::int64_t kDoubles = sizeof(Total) / sizeof(double);
  std::int64_t chunks = 0;
  for (const Batch* batch : batches) {
    for (const std::size_t i : batch->tensors) chunks += ceil_div(plan.tensors[i].numel, kSumChunk);
  }
  const torch::stable::Tensor partial = new_vector(chunks * kDoubles, ScalarType::Double, DeviceType::CUDA);
  auto* const partials = static_cast<Total*>(partial.data_ptr());
  std::int64_t done = 0;
  for (const Batch* batch : batches) done += launch(*batch, partials + done, stream);
  const torch::stable::Tensor total = new_vector(kDoubles, ScalarType::Double, DeviceType::CUDA);
  total_kernel<Total, false>
      <<<1, kTotalThreads, 0, stream>>>(partials, done, static_cast<Total*>(total.data_ptr()));
  check_cuda(cudaGetLastError());
  return total;
}

// The total over all devices, into `result` on the device of the first tensor.
template <typename Total, bool root, typename Launch>
void total_over_devices(const StepPlan& plan, torch::stable::Tensor& result, const OnDevice& home,
                        const Launch& launch) {
  constexpr std::int64_t kDoubles = sizeof(Total) / sizeof(double);
  const std::vector<Batch> batches = batches_of(plan);
  std::vector<torch::stable::Tensor> totals;
  for (std::size_t first = 0; first < batches.size();) {
    std::vector<const Batch*> on_device;
    const std::int32_t index = batches[first].device;
    for (; first < batches.size() && batches[first].device == index; ++first)
      on_device.push_back(&batches[first]);
    const OnDevice device(index);
    totals.push_back(total_on_device<Total>(plan, on_device, device.stream(), launch));
    if (index != plan.tensors.front().device) device.synchronize();
  }
  const auto devices = static_cast<std::int64_t>(totals.size());
  const torch::stable::Tensor gathered = new_vector(devices * kDoubles, ScalarType::Double, DeviceType::CUDA);
  auto* const each = static_cast<Total*>(gathered.data_ptr());
  for (std::int64_t i = 0; i < devices; ++i) {
    check_cuda(cudaMemcpyAsync(each + i, totals[static_cast<std::size_t>(i)].data_ptr(), sizeof(Total),
                               cudaMemcpyDefault, home.stream()));
  }
  total_kernel<Total, root>
      <<<1, kTotalThreads, 0, home.stream()>>>(each, devices, static_cast<Total*>(result.data_ptr()));
  check_cuda(cudaGetLastError());
}

// Launches the partial sums of a batch. Returns how many they are.
template <typename Op>
std::int64_t launch_sums(const StepPlan& plan, const Batch& batch, typename Op::Total* partials,
                         cudaStream_t stream) {
  const SumArgs args{batch.y == DType::kFloat16, batch.grad == DType::kFloat16};
  std::int64_t done = 0;
  // A head would have the order of additions depend on where the memory begins.
  for_each_launch<Op>(items_of<Op>(plan, batch), batch.dense, kSumChunk, /*peels=*/false,
                      [&](const auto& table) {
                        sum_kernel<Op><<<table.chunks, kThreads, 0, stream>>>(table, args, partials + done);
                        check_cuda(cudaGetLastError());
                        done += table.chunks;
                      });
  return done;
}

}  // namespace

void polyak_sums_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const ReductionCall call = check_polyak_sums(stack, Backend::kCuda);
  const OnDevice home(call.plan.tensors.front().device);
  torch::stable::Tensor sums = new_vector(2, ScalarType::Double, DeviceType::CUDA);
  total_over_devices<Sums<2>, false>(
      call.plan, sums, home, [&](const Batch& batch, Sums<2>* partials, cudaStream_t stream) {
        std::int64_t done = 0;
        with_parameter_and_gradient(batch, [&](auto y, auto grad) {
          done = launch_sums<PolyakSums<decltype(y), decltype(grad)>>(call.plan, batch, partials, stream);
        });
        return done;
      });
  stack[0] = torch::stable::detail::from(sums);
}

void grad_norm_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const ReductionCall call = check_grad_norm(stack, Backend::kCuda);
  const OnDevice home(call.plan.tensors.front().device);
  torch::stable::Tensor norm = new_scalar(ScalarType::Double, DeviceType::CUDA);
  total_over_devices<Sums<1>, true>(
      call.plan, norm, home, [&](const Batch& batch, Sums<1>* partials, cudaStream_t stream) {
        std::int64_t done = 0;
        with_gradient(batch, [&](auto grad) {
          done = launch_sums<SumOfSquares<decltype(grad)>>(call.plan, batch, partials, stream);
        });
        return done;
      });
  stack[0] = torch::stable::detail::from(norm);
}

}  // namespace schedulefree
