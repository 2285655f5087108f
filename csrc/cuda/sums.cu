#include <map>
#include <vector>

#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda/ops_cuda.h"

namespace schedulefree {
namespace {

// Elements per partial sum. The same for every GPU, and so are the sums.
constexpr std::int64_t kSumChunk = 8192;

// Totals on the current device.
template <typename Total>
torch::stable::Tensor new_totals(std::int64_t count) {
  constexpr std::int64_t kDoubles = sizeof(Total) / sizeof(double);
  return new_vector(count * kDoubles, ScalarType::Double, DeviceType::CUDA);
}

// The total over one device, into `result` there.
template <typename Total, bool root, typename Launch>
void total_on_device(const StepPlan& plan, const std::vector<const Batch*>& batches, cudaStream_t stream,
                     const Launch& launch, Total* result) {
  std::int64_t chunks = 0;
  for (const Batch* batch : batches) {
    for (const std::size_t i : batch->tensors) chunks += ceil_div(plan.tensors[i].numel, kSumChunk);
  }
  const torch::stable::Tensor partial = new_totals<Total>(chunks);
  auto* const partials = static_cast<Total*>(partial.data_ptr());
  std::int64_t done = 0;
  for (const Batch* batch : batches) done += launch(*batch, partials + done, stream);
  total_kernel<Total, root><<<1, kTotalThreads, 0, stream>>>(partials, done, result);
  check_cuda(cudaGetLastError());
}

// The total over all devices, into `result` on the device of the first tensor.
template <typename Total, bool root, typename Launch>
void total_over_devices(const StepPlan& plan, const torch::stable::Tensor& result, const OnDevice& home,
                        const Launch& launch) {
  auto* const total = static_cast<Total*>(result.data_ptr());
  const std::int32_t home_index = plan.tensors.front().device;
  const std::vector<Batch> batches = batches_of(plan);
  std::map<std::int32_t, std::vector<const Batch*>> devices;
  for (const Batch& batch : batches) devices[batch.device].push_back(&batch);
  const bool elsewhere = devices.size() != devices.count(home_index);
  if (!elsewhere)
    return total_on_device<Total, root>(plan, devices[home_index], home.stream(), launch, total);

  const auto count = static_cast<std::int64_t>(devices.size());
  const torch::stable::Tensor gathered = new_totals<Total>(count);
  auto* each = static_cast<Total*>(gathered.data_ptr());
  for (const auto& [index, on_device] : devices) {
    const OnDevice device(index);
    const torch::stable::Tensor own = new_totals<Total>(1);
    total_on_device<Total, false>(plan, on_device, device.stream(), launch,
                                  static_cast<Total*>(own.data_ptr()));
    if (index != home_index) device.synchronize();
    check_cuda(cudaMemcpyAsync(each++, own.data_ptr(), sizeof(Total), cudaMemcpyDefault, home.stream()));
    if (index != home_index) home.synchronize();  // before `own` goes
  }
  total_kernel<Total, root>
      <<<1, kTotalThreads, 0, home.stream()>>>(static_cast<Total*>(gathered.data_ptr()), count, total);
  check_cuda(cudaGetLastError());
}

// Launches the partial sums of a batch. Returns how many they are.
template <typename Op>
std::int64_t launch_sums(const StepPlan& plan, const Batch& batch, typename Op::Total* partials,
                         cudaStream_t stream) {
  const SumArgs args{batch.grad == DType::kFloat16};
  std::int64_t done = 0;
  for_each_launch<Op>(plan, batch, kSumChunk, [&](const auto& table) {
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
  const torch::stable::Tensor sums = new_vector(2, ScalarType::Double, DeviceType::CUDA);
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
  const torch::stable::Tensor norm = new_scalar(ScalarType::Double, DeviceType::CUDA);
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
