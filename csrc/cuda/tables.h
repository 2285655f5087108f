// From a checked call to the tables of tensors that kernels take. Plain C++, but for the markers of device
// code.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/multi_tensor.h"
#include "cuda/step_kernel.h"
#include "step_args.h"

namespace schedulefree {

// Tensors on one device and of one combination of dtypes, all of them dense or each with gaps somewhere.
struct Batch {
  std::int32_t device = -1;
  DType y = DType::kFloat32, y_lo = DType::kFloat32, grad = DType::kFloat32;  // y_lo: that of y without one
  bool moment8 = false;                                                       // the second moment has 8 bits
  bool dense = true;
  std::vector<std::size_t> tensors;  // their places in the plan; never empty
};

// The batches of a plan, of which the tensors without elements are no part. Batches of one device follow each
// other; of two batches of one device, that with the earlier tensor comes first.
//
// Throws std::runtime_error for a tensor of more than kMaxDims dimensions.
inline std::vector<Batch> batches_of(const StepPlan& plan) {
  const auto kind = [](const Batch& b) {
    return std::make_tuple(b.device, b.y, b.y_lo, b.grad, b.moment8, b.dense);
  };
  std::vector<Batch> batches;
  for (std::size_t i = 0; i < plan.tensors.size(); ++i) {
    const TensorArgs& t = plan.tensors[i];
    if (t.numel == 0) continue;
    Batch batch;
    batch.device = t.device;
    batch.y = t.y.dtype;
    batch.grad = t.grad.dtype;
    batch.y_lo = t.y_lo.data != nullptr ? t.y_lo.dtype : t.y.dtype;
    batch.moment8 = t.exp_avg_sq_scale.data != nullptr;
    if (t.ndim > kMaxDims) {
      throw std::runtime_error("schedulefree_cpp: tensor " + std::to_string(i) +
                               " of a list: expected at most " + std::to_string(kMaxDims) +
                               " dimensions that strides keep apart, got " + std::to_string(t.ndim));
    }
    for (const Stream* stream : {&t.y, &t.y_lo, &t.grad, &t.z, &t.z_lo, &t.exp_avg_sq, &t.exp_avg})
      batch.dense = batch.dense && stream->strides == nullptr;
    const auto same = [&](const Batch& other) { return kind(other) == kind(batch); };
    auto place = std::find_if(batches.begin(), batches.end(), same);
    if (place == batches.end()) place = batches.insert(place, batch);
    place->tensors.push_back(i);
  }
  std::stable_sort(batches.begin(), batches.end(),
                   [](const Batch& l, const Batch& r) { return l.device < r.device; });
  return batches;
}

// What a kernel takes beside its table, at most.
constexpr std::size_t kScalarArguments = std::max(sizeof(StepSource), sizeof(StepArgs<double>));

template <typename Op, std::size_t arguments>
using TableOf = TensorTable<Op::kStreams, table_capacity(arguments, Op::kStreams, kScalarArguments)>;

// Calls `visit(table)` for every table that the tensors of a batch without gaps fill.
template <typename Op, std::size_t arguments, typename Visit>
void visit_dense(const StepPlan& plan, const Batch& batch, std::int64_t chunk, const Visit& visit) {
  int element_sizes[Op::kStreams];
  Op::element_sizes(element_sizes);
  const auto table = std::make_unique<TableOf<Op, arguments>>();
  table->clear(chunk);
  for (const std::size_t i : batch.tensors) {
    const TensorArgs& tensor = plan.tensors[i];
    const Stream* streams[Op::kStreams];
    Op::streams(tensor, streams);
    void* pointers[Op::kStreams];
    for (int s = 0; s < Op::kStreams; ++s) pointers[s] = streams[s]->data;
    if (table->append(pointers, element_sizes, tensor.numel)) continue;
    visit(*table);
    table->clear(chunk);
    if (!table->append(pointers, element_sizes, tensor.numel))
      throw std::runtime_error("schedulefree_cpp: a tensor has more elements than one launch can reach");
  }
  visit(*table);
}

// The same for a batch with gaps: each tensor is a table of its own.
template <typename Op, typename Visit>
void visit_strided(const StepPlan& plan, const Batch& batch, std::int64_t chunk, const Visit& visit) {
  for (const std::size_t i : batch.tensors) {
    const TensorArgs& args = plan.tensors[i];
    const Stream* streams[Op::kStreams];
    Op::streams(args, streams);
    StridedTensor<Op::kStreams> tensor;
    tensor.numel = args.numel;
    tensor.chunk_size = static_cast<std::int32_t>(chunk);
    const std::int64_t chunks = ceil_div(args.numel, chunk);
    if (chunks > kMaxChunks)
      throw std::runtime_error("schedulefree_cpp: a tensor has more elements than one launch can reach");
    tensor.chunks = static_cast<std::uint32_t>(chunks);
    tensor.ndim = static_cast<std::int32_t>(args.ndim);
    for (int s = 0; s < Op::kStreams; ++s) {
      tensor.data[s] = streams[s]->data;
      std::int64_t dense = 1;
      for (std::int32_t d = tensor.ndim - 1; d >= 0; --d) {
        tensor.strides[s][d] = streams[s]->strides ? streams[s]->strides[d] : dense;
        dense *= args.sizes[d];
      }
    }
    for (std::int32_t d = 0; d < tensor.ndim; ++d) tensor.sizes[d] = args.sizes[d];
    visit(tensor);
  }
}

}  // namespace schedulefree
