#include "checks.h"
#include "cuda/launch.cuh"
#include "cuda/ops_cuda.h"

namespace schedulefree {
namespace {

// ---- the plain swaps -------------------------------------------------------------------------------

void swap_batch(const StepPlan& plan, const Batch& batch, const SwapScalars& swap, cudaStream_t stream) {
  with_parameter(batch, [&](auto y) {
    using Op = Swap<decltype(y)>;
    launch_swap<Op>(plan, batch, typename Op::Args(swap, batch.y == DType::kFloat16), stream);
  });
}

void swap_all(const SwapCall& call) {
  for (const Batch& batch : batches_of(call.plan)) {
    const OnDevice device(batch.device);
    swap_batch(call.plan, batch, call.swap, device.stream());
  }
}

// ---- the swap that keeps what it loses -------------------------------------------------------------

// Not that of the plain swaps: what is kept must not depend on the GPU.
constexpr std::int64_t kKeepChunk = 8192;

template <typename T>
T* data_of(const torch::stable::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

template <typename T>
void copy(T* to, const T* from, std::size_t count, cudaStream_t stream) {
  if (count > 0) check_cuda(cudaMemcpyAsync(to, from, count * sizeof(T), cudaMemcpyDefault, stream));
}

// Calls `visit(y, batch, table, first_chunk)` for every launch of the batches of one device. Chunks are
// counted through; `y` is the storage of the batch's parameters.
template <typename Visit>
void for_each_keep_launch(const StepPlan& plan, const std::vector<const Batch*>& batches,
                          const Visit& visit) {
  std::int64_t first_chunk = 0;
  for (const Batch* batch : batches) {
    with_parameter(*batch, [&](auto y) {
      using Op = KeepingSwap<decltype(y)>;
      for_each_launch<Op>(items_of<Op>(plan, *batch), batch->dense, kKeepChunk, /*peels=*/false,
                          [&](const auto& table) {
                            visit(y, *batch, table, first_chunk);
                            first_chunk += table.chunks;
                          });
    });
  }
}

// What one device keeps.
struct KeptOn {
  std::int32_t device = -1;
  std::vector<const Batch*> batches;
  std::vector<std::size_t> tensors;  // places in the plan, ascending
  std::int64_t size = 0;
  torch::stable::Tensor at, value;
};

// Swaps on one device and keeps. Fills in `count` for its tensors.
void keep_on_device(const ExactSwapCall& call, KeptOn& kept, std::int64_t* count) {
  const OnDevice device(kept.device);
  const StepPlan& plan = call.plan;
  const cudaStream_t stream = device.stream();
  const auto args_of = [&](const Batch& batch, auto y) {
    return ExactSwapArgs<typename decltype(y)::Real>(call.swap, call.back, batch.y == DType::kFloat16);
  };

  // The chunks of a batch's tensors follow each other, in the order of the batch.
  std::vector<std::int64_t> first_chunk(plan.tensors.size());
  std::int64_t chunks = 0;
  for (const Batch* batch : kept.batches) {
    for (const std::size_t i : batch->tensors) {
      first_chunk[i] = chunks;
      chunks += ceil_div(plan.tensors[i].numel, kKeepChunk);
    }
  }

  const torch::stable::Tensor lost = new_vector(chunks, ScalarType::Long, DeviceType::CUDA);
  for_each_keep_launch(plan, kept.batches,
                       [&](auto y, const Batch& batch, const auto& table, std::int64_t first) {
                         count_lost_kernel<KeepingSwap<decltype(y)>><<<table.chunks, kThreads, 0, stream>>>(
                             table, args_of(batch, y), data_of<std::int64_t>(lost) + first);
                         check_cuda(cudaGetLastError());
                       });
  std::vector<std::int64_t> begins(static_cast<std::size_t>(chunks));
  copy(begins.data(), data_of<std::int64_t>(lost), begins.size(), stream);
  device.synchronize();

  // From how many to where they begin.
  for (const std::size_t i : kept.tensors) {
    const std::int64_t begin = kept.size;
    const auto first = static_cast<std::size_t>(first_chunk[i]);
    const auto last = first + static_cast<std::size_t>(ceil_div(plan.tensors[i].numel, kKeepChunk));
    for (std::size_t chunk = first; chunk < last; ++chunk) {
      const std::int64_t here = begins[chunk];
      begins[chunk] = kept.size;
      kept.size += here;
    }
    count[i] = kept.size - begin;
  }

  kept.at = new_vector(kept.size, ScalarType::Long, DeviceType::CUDA);
  kept.value = new_vector(kept.size, ScalarType::Double, DeviceType::CUDA);
  copy(data_of<std::int64_t>(lost), begins.data(), begins.size(), stream);
  for_each_keep_launch(plan, kept.batches,
                       [&](auto y, const Batch& batch, const auto& table, std::int64_t first) {
                         keep_kernel<KeepingSwap<decltype(y)>><<<table.chunks, kThreads, 0, stream>>>(
                             table, args_of(batch, y), data_of<std::int64_t>(lost) + first,
                             data_of<std::int64_t>(kept.at), data_of<double>(kept.value));
                         check_cuda(cudaGetLastError());
                       });
  // `begins` is read by the copy until then.
  device.synchronize();
}

std::vector<KeptOn> devices_of(const std::vector<Batch>& batches) {
  std::vector<KeptOn> devices;
  for (const Batch& batch : batches) {
    if (devices.empty() || devices.back().device != batch.device) {
      devices.emplace_back();
      devices.back().device = batch.device;
    }
    KeptOn& on = devices.back();
    on.batches.push_back(&batch);
    on.tensors.insert(on.tensors.end(), batch.tensors.begin(), batch.tensors.end());
  }
  for (KeptOn& on : devices) std::sort(on.tensors.begin(), on.tensors.end());
  return devices;
}

// ---- and the one that restores it ------------------------------------------------------------------

void restore_batch(const SwapRestoreCall& call, const Batch& batch, const std::int64_t* at,
                   const double* value, cudaStream_t stream) {
  const StepPlan& plan = call.exact.plan;
  std::vector<std::pair<Stream, Stream>> lists(batch.tensors.size());
  with_parameter(batch, [&](auto y) {
    using Op = RestoreKept<decltype(y)>;
    std::vector<Item<Op::kStreams>> items;
    for (const std::size_t i : batch.tensors) {
      const Kept& kept = call.kept[i];
      if (kept.size == 0) continue;
      // On this device the lists begin at `at` and `value`.
      const std::int64_t begin = kept.at - data_of<std::int64_t>(call.at);
      auto& [ats, values] = lists[items.size()];
      ats.data = const_cast<std::int64_t*>(at + begin);
      values.data = const_cast<double*>(value + begin);
      items.emplace_back();
      items.back().tensor = &plan.tensors[i];
      items.back().numel = kept.size;
      Op::streams(plan.tensors[i], ats, values, items.back().stream);
    }
    // The call is the way back; the arguments name the way there first.
    const typename Op::Args args(call.exact.back, call.exact.swap, batch.y == DType::kFloat16);
    for_each_launch<Op>(items, batch.dense, kKeepChunk, /*peels=*/false, [&](const auto& table) {
      restore_kernel<Op><<<table.chunks, kThreads, 0, stream>>>(table, args);
      check_cuda(cudaGetLastError());
    });
  });
}

}  // namespace

void y_to_x_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  swap_all(check_y_to_x(stack, Backend::kCuda));
}

void x_to_y_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  swap_all(check_x_to_y(stack, Backend::kCuda));
}

void y_to_x_keep_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  const ExactSwapCall call = check_y_to_x_keep(stack, Backend::kCuda);
  const std::vector<Batch> batches = batches_of(call.plan);
  std::vector<std::int64_t> count(call.plan.tensors.size());
  std::vector<KeptOn> devices = devices_of(batches);
  std::int64_t total = 0;
  for (KeptOn& on : devices) {
    keep_on_device(call, on, count.data());
    total += on.size;
  }

  const OnDevice home(call.plan.tensors.front().device);
  torch::stable::Tensor at, value;
  if (devices.size() == 1 && devices.front().device == call.plan.tensors.front().device) {
    at = devices.front().at;
    value = devices.front().value;
  } else {
    at = new_vector(total, ScalarType::Long, DeviceType::CUDA);
    value = new_vector(total, ScalarType::Double, DeviceType::CUDA);
    std::vector<std::int64_t> begins(count.size());
    for (std::size_t i = 1; i < count.size(); ++i) begins[i] = begins[i - 1] + count[i - 1];
    for (const KeptOn& on : devices) {
      std::int64_t from = 0;
      for (const std::size_t i : on.tensors) {
        const auto size = static_cast<std::size_t>(count[i]);
        copy(data_of<std::int64_t>(at) + begins[i], data_of<std::int64_t>(on.at) + from, size, home.stream());
        copy(data_of<double>(value) + begins[i], data_of<double>(on.value) + from, size, home.stream());
        from += count[i];
      }
    }
  }
  const torch::stable::Tensor counts =
      new_vector(static_cast<std::int64_t>(count.size()), ScalarType::Long, DeviceType::CUDA);
  copy(data_of<std::int64_t>(counts), count.data(), count.size(), home.stream());
  home.synchronize();
  stack[0] = torch::stable::detail::from(at);
  stack[1] = torch::stable::detail::from(value);
  stack[2] = torch::stable::detail::from(counts);
}

void x_to_y_restore_cuda(StableIValue* stack, std::uint64_t, std::uint64_t) {
  SwapRestoreCall call = check_x_to_y_restore(stack, Backend::kCuda);
  const std::size_t total = static_cast<std::size_t>(call.at.numel());
  const std::int32_t home = call.at.get_device_index();
  std::vector<std::int64_t> count(call.exact.plan.tensors.size()), at(total);
  {
    const OnDevice device(home);
    copy(count.data(), data_of<std::int64_t>(call.count), count.size(), device.stream());
    copy(at.data(), data_of<std::int64_t>(call.at), at.size(), device.stream());
    device.synchronize();
  }
  split_kept(call, count.data(), at.data());

  for (const Batch& batch : batches_of(call.exact.plan)) {
    const OnDevice device(batch.device);
    swap_batch(call.exact.plan, batch, call.exact.swap, device.stream());
    torch::stable::Tensor at_here = call.at, value_here = call.value;
    if (batch.device != home) {
      at_here = new_vector(call.at.numel(), ScalarType::Long, DeviceType::CUDA);
      value_here = new_vector(call.at.numel(), ScalarType::Double, DeviceType::CUDA);
      copy(data_of<std::int64_t>(at_here), data_of<std::int64_t>(call.at), total, device.stream());
      copy(data_of<double>(value_here), data_of<double>(call.value), total, device.stream());
    }
    restore_batch(call, batch, data_of<std::int64_t>(at_here), data_of<double>(value_here), device.stream());
  }
}

}  // namespace schedulefree
