#include "cuda/launch.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda/multi_tensor.h"
#include "cuda/updates.cuh"

namespace schedulefree::cuda {
namespace {

template <typename Table>
void visit_dense(const StepPlan& plan, const Batch& batch, std::int64_t chunk,
                 const std::function<void(const void*, std::uint32_t)>& visit) {
  const std::vector<StreamInfo> streams = streams_of(batch.id);
  void* pointers[kStreamIds];
  int element_sizes[kStreamIds];
  auto table = std::make_unique<Table>(chunk);
  for (const std::size_t i : batch.tensors) {
    const TensorArgs& tensor = plan.tensors[i];
    for (std::size_t s = 0; s < streams.size(); ++s) {
      pointers[s] = (tensor.*streams[s].stream).data;
      element_sizes[s] = size_of(streams[s].dtype);
    }
    if (table->append(pointers, element_sizes, tensor.numel)) continue;
    visit(table.get(), table->chunks);
    *table = Table(chunk);
    if (!table->append(pointers, element_sizes, tensor.numel))
      throw std::runtime_error("schedulefree_cpp: a tensor has more elements than one launch can reach");
  }
  visit(table.get(), table->chunks);
}

// Each tensor is a table of its own.
template <int streams>
void visit_strided(const StepPlan& plan, const Batch& batch, std::int64_t chunk,
                   const std::function<void(const void*, std::uint32_t)>& visit) {
  const std::vector<StreamInfo> infos = streams_of(batch.id);
  for (const std::size_t i : batch.tensors) {
    const TensorArgs& args = plan.tensors[i];
    StridedTensor<streams> tensor{};
    tensor.numel = args.numel;
    tensor.chunk_size = static_cast<std::int32_t>(chunk);
    const std::int64_t chunks = ceil_div(args.numel, chunk);
    if (chunks > kMaxChunks)
      throw std::runtime_error("schedulefree_cpp: a tensor has more elements than one launch can reach");
    tensor.chunks = static_cast<std::uint32_t>(chunks);
    tensor.ndim = static_cast<std::int32_t>(args.ndim);
    std::copy_n(args.sizes, args.ndim, tensor.sizes);
    for (std::size_t s = 0; s < streams; ++s) {
      const Stream& stream = args.*infos[s].stream;
      tensor.data[s] = stream.data;
      std::int64_t dense = 1;
      for (std::int32_t d = tensor.ndim - 1; d >= 0; --d) {
        tensor.strides[s][d] = stream.strides != nullptr ? stream.strides[d] : dense;
        dense *= args.sizes[d];
      }
    }
    visit(&tensor, tensor.chunks);
  }
}

template <int streams>
void visit_tables(const StepPlan& plan, const Batch& batch, std::int64_t chunk,
                  const std::function<void(const void*, std::uint32_t)>& visit) {
  switch (batch.id.table) {
    case TableKind::kLarge:
      return visit_dense<LargeTable<streams>>(plan, batch, chunk, visit);
    case TableKind::kSmall:
      return visit_dense<SmallTable<streams>>(plan, batch, chunk, visit);
    case TableKind::kStrided:
      return visit_strided<streams>(plan, batch, chunk, visit);
  }
}

template <typename T>
Argument argument_of(const T& value) {
  static_assert(sizeof(T) <= sizeof(Argument) && sizeof(T) <= kScalarArguments,
                "the table leaves room for it");
  Argument argument;
  std::memcpy(argument.bytes, &value, sizeof(value));
  return argument;
}

// Launches a kernel over a batch, with what stands behind the table.
void launch_batch(const StepPlan& plan, const Batch& batch, std::int64_t chunk, const Argument& argument,
                  Torch& torch) {
  const Device& on = device(batch.device);
  const Handle stream = torch.stream(batch.device);
  const Handle kernel = kernel_on(on, batch.id, stream);
  const InContext context(on);
  for_each_table(plan, batch, chunk, [&](const void* table, std::uint32_t chunks) {
    launch(kernel, chunks, kThreads, stream, table, &argument);
  });
}

void copy_to(int home, void* to, const void* from, std::size_t bytes, Torch& torch) {
  driver().cuMemcpyAsync(reinterpret_cast<Address>(to), reinterpret_cast<Address>(from), bytes,
                         torch.stream(home));
}

void synchronize(int index, Torch& torch) {
  const InContext context(device(index));
  driver().cuStreamSynchronize(torch.stream(index));
}

// The scalars of a captured step, as the kernels of a device read them.
const void* resolved_on(int index, bool wide, const double* coefs, int home, Torch& torch) {
  if (index != home) {
    synchronize(home, torch);
    void* const copy = torch.allocate(index, sizeof(StepCoefficients));
    const InContext context(device(index));
    copy_to(index, copy, coefs, sizeof(StepCoefficients), torch);
    coefs = static_cast<const double*>(copy);
  }
  KernelId id;
  id.op = Op::kResolve;
  id.y = wide ? Format::kFloat64 : Format::kFloat32;
  void* const resolved = torch.allocate(index, sizeof(ResolvedStep<double>));
  const Handle kernel = kernel_on(device(index), id, torch.stream(index));
  const InContext context(device(index));
  launch(kernel, 1, 1, torch.stream(index), &coefs, &resolved);
  return resolved;
}

// Calls `launch(batch, resolved)` for the batches of a step, where it is taken as far as the host knows. With
// `device_coefs` it is captured, and `resolved` points to its scalars.
template <typename Launch>
void for_each_batch(const StepPlan& plan, Op op, const StepCoefficients& coefs, const double* device_coefs,
                    int home, Torch& torch, const Launch& launch) {
  const bool captured = device_coefs != nullptr;
  if (!captured && coefs.take == 0) return;
  std::map<std::pair<int, bool>, const void*> resolved;  // by device and precision
  for (Batch& batch : batches_of(plan, op, largest_table())) {
    const bool wide = batch.id.wide();
    const void*& scalars = resolved[{batch.device, wide}];
    if (captured && scalars == nullptr) scalars = resolved_on(batch.device, wide, device_coefs, home, torch);
    batch.id.captured = captured;
    launch(batch, scalars);
  }
}

template <typename StepSource>
Argument base_step_argument(const StepSource& step, const SwapWeight& to_x) {
  return argument_of(BaseStepSource<StepSource>{step, to_x});
}

template <typename Real>
Argument base_step_scalars_of(const KernelId& id, const StepCoefficients& coefs, const void* resolved,
                              const SwapWeight& to_x) {
  using FromDevice = Captured<DecayAt::kNowhere>::Source<Real>;
  using FromHost = Known<DecayAt::kNowhere, false>::Source<Real>;
  if (id.captured)
    return base_step_argument(FromDevice{static_cast<const ResolvedStep<Real>*>(resolved)}, to_x);
  return base_step_argument(FromHost{StepScalars<Real>(coefs)}, to_x);
}

// Adds totals up on one device, into `result` there.
void launch_total(int index, int sums, bool root, const double* totals, std::int64_t count, double* result,
                  Torch& torch) {
  KernelId id;
  id.op = Op::kTotal;
  id.sums = sums;
  id.root = root;
  const Handle kernel = kernel_on(device(index), id, torch.stream(index));
  const InContext context(device(index));
  launch(kernel, 1, kTotalThreads, torch.stream(index), &totals, &count, &result);
}

double* allocate_doubles(int index, std::int64_t count, Torch& torch) {
  return static_cast<double*>(torch.allocate(index, static_cast<std::size_t>(count) * sizeof(double)));
}

}  // namespace

std::vector<Batch> batches_of(const StepPlan& plan, Op op, TableKind dense) {
  std::vector<Batch> batches;
  for (std::size_t i = 0; i < plan.tensors.size(); ++i) {
    const TensorArgs& tensor = plan.tensors[i];
    if (tensor.numel == 0) continue;
    if (tensor.ndim > kMaxDims) {
      throw std::runtime_error("schedulefree_cpp: tensor " + std::to_string(i) +
                               " of a list: expected at most " + std::to_string(kMaxDims) +
                               " dimensions that strides keep apart, got " + std::to_string(tensor.ndim));
    }
    KernelId id = kernel_for(op, tensor);
    if (id.table != TableKind::kStrided) id.table = dense;
    const auto same = [&](const Batch& b) { return b.device == tensor.device && b.id == id; };
    auto batch = std::find_if(batches.begin(), batches.end(), same);
    if (batch == batches.end()) batch = batches.insert(batch, {tensor.device, id, {}});
    batch->tensors.push_back(i);
  }
  std::sort(batches.begin(), batches.end(), [](const Batch& l, const Batch& r) {
    return std::pair(l.device, l.tensors.front()) < std::pair(r.device, r.tensors.front());
  });
  return batches;
}

void for_each_table(const StepPlan& plan, const Batch& batch, std::int64_t chunk,
                    const std::function<void(const void*, std::uint32_t)>& visit) {
  using Visit = void (*)(const StepPlan&, const Batch&, std::int64_t,
                         const std::function<void(const void*, std::uint32_t)>&);
  static constexpr Visit kByStreams[kStreamIds] = {&visit_tables<1>, &visit_tables<2>, &visit_tables<3>,
                                                   &visit_tables<4>, &visit_tables<5>, &visit_tables<6>,
                                                   &visit_tables<7>, &visit_tables<8>};
  kByStreams[streams_of(batch.id).size() - 1](plan, batch, chunk, visit);
}

Argument known_scalars(const KernelId& id, const StepCoefficients& coefs) {
  return id.wide() ? argument_of(StepScalars<double>(coefs)) : argument_of(StepScalars<float>(coefs));
}
Argument captured_scalars(const void* resolved) { return argument_of(resolved); }
Argument swap_weight(const SwapWeight& weight) { return argument_of(weight); }
Argument base_step_scalars(const KernelId& id, const StepCoefficients& coefs, const void* resolved,
                           const SwapWeight& to_x) {
  return id.wide() ? base_step_scalars_of<double>(id, coefs, resolved, to_x)
                   : base_step_scalars_of<float>(id, coefs, resolved, to_x);
}

void launch_step(const StepPlan& plan, Op op, DecayAt decay_at, const StepCoefficients& coefs,
                 const double* device_coefs, int home, Torch& torch) {
  for_each_batch(plan, op, coefs, device_coefs, home, torch, [&](Batch& batch, const void* resolved) {
    KernelId& id = batch.id;
    if (id.captured) {
      id.decay_at = decay_at;
      launch_batch(plan, batch, kUpdateChunk, captured_scalars(resolved), torch);
    } else {
      id.decay_at = coefs.weight_decay == 0 ? DecayAt::kNowhere : decay_at;
      id.at_random = coefs.stochastic != 0 && id.y == Format::kSplit24;
      launch_batch(plan, batch, kUpdateChunk, known_scalars(id, coefs), torch);
    }
  });
}

void launch_base_step(const StepPlan& plan, Op op, bool exchange, const SwapWeight& to_x,
                      const StepCoefficients& coefs, const double* device_coefs, int home, Torch& torch) {
  for_each_batch(plan, op, coefs, device_coefs, home, torch, [&](Batch& batch, const void* resolved) {
    batch.id.exchange = exchange;
    launch_batch(plan, batch, kUpdateChunk, base_step_scalars(batch.id, coefs, resolved, to_x), torch);
  });
}

void launch_swap(const StepPlan& plan, const SwapWeight& weight, Torch& torch) {
  for (const Batch& batch : batches_of(plan, Op::kSwap, largest_table()))
    launch_batch(plan, batch, kUpdateChunk, swap_weight(weight), torch);
}

void launch_sums(const StepPlan& plan, Op op, double* result, Torch& torch) {
  const int sums = op == Op::kPolyakSums ? 2 : 1, home = plan.tensors.front().device;
  const bool root = op == Op::kGradNorm;
  const std::vector<Batch> batches = batches_of(plan, op, largest_table());
  std::map<int, std::int64_t> chunks;  // of each device
  for (const Batch& batch : batches) {
    for (const std::size_t i : batch.tensors)
      chunks[batch.device] += ceil_div(plan.tensors[i].numel, kSumChunk);
  }
  std::map<int, double*> partials;
  for (const auto& [index, count] : chunks) partials[index] = allocate_doubles(index, count * sums, torch);
  std::map<int, double*> next = partials;
  for (const Batch& batch : batches) {
    double*& place = next[batch.device];
    const Device& on = device(batch.device);
    const Handle stream = torch.stream(batch.device), kernel = kernel_on(on, batch.id, stream);
    const InContext context(on);
    for_each_table(plan, batch, kSumChunk, [&](const void* table, std::uint32_t count) {
      launch(kernel, count, kThreads, stream, table, &place);
      place += static_cast<std::int64_t>(count) * sums;
    });
  }
  const bool elsewhere = chunks.size() != chunks.count(home);
  if (!elsewhere) return launch_total(home, sums, root, partials[home], chunks[home], result, torch);

  double* const gathered = allocate_doubles(home, static_cast<std::int64_t>(chunks.size()) * sums, torch);
  std::int64_t done = 0;
  for (const auto& [index, count] : chunks) {
    double* const total = allocate_doubles(index, sums, torch);
    launch_total(index, sums, false, partials[index], count, total, torch);
    if (index != home) synchronize(index, torch);
    const InContext context(device(home));
    copy_to(home, gathered + sums * done++, total, static_cast<std::size_t>(sums) * sizeof(double), torch);
    if (index != home) driver().cuStreamSynchronize(torch.stream(home));  // before `total` goes
  }
  launch_total(home, sums, root, gathered, done, result, torch);
}

void launch_schedule(const ScheduleArgs& args, int index, Torch& torch) {
  const auto read = [](const ScalarInput& input, double absent) {
    return input.on_cpu ? value_or(input, absent) : absent;
  };
  const StepInputs known = {read(args.lr, 0), read(args.weight_decay, 0), read(args.grad_norm, 0),
                            read(args.grad_scale, 1), read(args.found_inf, 0)};
  KernelId id;
  id.op = Op::kSchedule;
  id.kind = args.rule.kind;
  const Handle stream = torch.stream(index), kernel = kernel_on(device(index), id, stream);
  const InContext context(device(index));
  launch(kernel, 1, 1, stream, &args, &known);
}

}  // namespace schedulefree::cuda
