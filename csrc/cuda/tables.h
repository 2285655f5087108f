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
  DType y = DType::kFloat32, grad = DType::kFloat32;
  bool has_low = false;
  bool dense = true;
  std::vector<std::size_t> tensors;  // their places in the plan; never empty
};

// The batches of a plan, of which the tensors without elements are no part. Batches of one device follow each
// other; of two batches of one device, that with the earlier tensor comes first.
//
// Throws std::runtime_error for a tensor of more than kMaxDims dimensions.
inline std::vector<Batch> batches_of(const StepPlan& plan) {
  const auto kind = [](const Batch& b) { return std::make_tuple(b.device, b.y, b.grad, b.has_low, b.dense); };
  std::vector<Batch> batches;
  for (std::size_t i = 0; i < plan.tensors.size(); ++i) {
    const TensorArgs& t = plan.tensors[i];
    if (t.numel == 0) continue;
    Batch batch;
    batch.device = t.device;
    batch.y = t.y.dtype;
    batch.grad = t.grad.dtype;
    batch.has_low = t.y_lo.data != nullptr;
    if (t.ndim > kMaxDims) {
      throw std::runtime_error("schedulefree_cpp: tensor " + std::to_string(i) +
                               " of a list: expected at most " + std::to_string(kMaxDims) +
                               " dimensions that strides keep apart, got " + std::to_string(t.ndim));
    }
    for (const Stream* stream : {&t.y, &t.y_lo, &t.grad, &t.z, &t.exp_avg_sq, &t.exp_avg})
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

// What a kernel takes beside its table.
constexpr std::size_t kScalarArguments = sizeof(StepSource) + 3 * sizeof(void*);
static_assert(sizeof(StepArgs<double>) <= sizeof(StepSource) &&
              sizeof(ExactSwapArgs<double>) <= sizeof(StepSource));

template <typename Op, std::size_t arguments>
using TableOf = TensorTable<Op::kStreams, table_capacity(arguments, Op::kStreams, kScalarArguments)>;

// What a visitor needs of a tensor: its streams in the order of a kernel, and how many elements to go
// through.
template <int streams>
struct Item {
  const TensorArgs* tensor = nullptr;
  const Stream* stream[streams] = {};
  std::int64_t numel = 0;
};

// The tensors of a batch as a kernel takes them.
template <typename Op>
std::vector<Item<Op::kStreams>> items_of(const StepPlan& plan, const Batch& batch) {
  std::vector<Item<Op::kStreams>> items(batch.tensors.size());
  for (std::size_t i = 0; i < items.size(); ++i) {
    const TensorArgs& tensor = plan.tensors[batch.tensors[i]];
    items[i].tensor = &tensor;
    Op::streams(tensor, items[i].stream);
    items[i].numel = tensor.numel;
  }
  return items;
}

// Calls `visit(table)` for every table that the items fill, none of which has gaps.
template <typename Op, std::size_t arguments, typename Visit>
void visit_dense(const std::vector<Item<Op::kStreams>>& items, std::int64_t chunk, bool peels,
                 const Visit& visit) {
  int element_sizes[Op::kStreams];
  Op::element_sizes(element_sizes);
  const auto table = std::make_unique<TableOf<Op, arguments>>();
  table->clear(chunk);
  for (const Item<Op::kStreams>& item : items) {
    void* pointers[Op::kStreams];
    for (int s = 0; s < Op::kStreams; ++s) pointers[s] = item.stream[s]->data;
    if (table->append(pointers, element_sizes, item.numel, peels)) continue;
    visit(*table);
    table->clear(chunk);
    if (!table->append(pointers, element_sizes, item.numel, peels))
      throw std::runtime_error("schedulefree_cpp: a tensor has more elements than one launch can reach");
  }
  visit(*table);
}

// The same for items that have gaps: each is a table of its own.
template <typename Op, typename Visit>
void visit_strided(const std::vector<Item<Op::kStreams>>& items, std::int64_t chunk, const Visit& visit) {
  for (const Item<Op::kStreams>& item : items) {
    StridedTensor<Op::kStreams> tensor;
    tensor.numel = item.numel;
    tensor.chunk_size = static_cast<std::int32_t>(chunk);
    const std::int64_t chunks = ceil_div(item.numel, chunk);
    if (chunks > kMaxChunks)
      throw std::runtime_error("schedulefree_cpp: a tensor has more elements than one launch can reach");
    tensor.chunks = static_cast<std::uint32_t>(chunks);
    tensor.ndim = static_cast<std::int32_t>(item.tensor->ndim);
    for (int s = 0; s < Op::kStreams; ++s) {
      tensor.data[s] = item.stream[s]->data;
      std::int64_t dense = 1;
      for (std::int32_t d = tensor.ndim - 1; d >= 0; --d) {
        tensor.strides[s][d] = item.stream[s]->strides ? item.stream[s]->strides[d] : dense;
        dense *= item.tensor->sizes[d];
      }
    }
    for (std::int32_t d = 0; d < tensor.ndim; ++d) tensor.sizes[d] = item.tensor->sizes[d];
    visit(tensor);
  }
}

}  // namespace schedulefree
