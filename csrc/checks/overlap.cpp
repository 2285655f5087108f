#include "checks/overlap.h"

#include <algorithm>
#include <functional>

namespace schedulefree {
namespace {

// Dimensions of more than one element, largest stride first.
std::vector<std::pair<std::int64_t, std::int64_t>> stride_size_pairs(const TensorInfo& t) {
  std::vector<std::pair<std::int64_t, std::int64_t>> dims;
  for (std::int64_t d = 0; d < t.ndim; ++d) {
    if (t.sizes[d] != 1) dims.emplace_back(t.strides[d], t.sizes[d]);
  }
  std::sort(dims.begin(), dims.end(), std::greater<>());
  return dims;
}

}  // namespace

bool may_overlap_itself(const TensorInfo& t) {
  if (t.numel == 0) return false;
  std::int64_t extent = 1;
  const auto dims = stride_size_pairs(t);
  for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
    if (dim->first < extent) return true;
    extent += dim->first * (dim->second - 1);
  }
  return false;
}

Extent bounding_extent(At at, const TensorInfo& t, std::int64_t element_size, bool contiguous, bool written) {
  const std::int64_t last = contiguous ? t.numel - 1 : last_offset(t);
  const auto begin = reinterpret_cast<std::uintptr_t>(t.data);
  return {begin, begin + static_cast<std::uintptr_t>((last + 1) * element_size), at, written};
}

void append_runs(At at, const TensorInfo& t, std::int64_t element_size, bool written,
                 std::vector<Extent>& extents) {
  auto dims = stride_size_pairs(t);
  std::int64_t run = 1;
  while (!dims.empty() && dims.back().first == run) {
    run *= dims.back().second;
    dims.pop_back();
  }
  std::int64_t runs = t.numel == 0 ? 0 : 1;
  for (const auto& dim : dims) runs *= dim.second;
  for (std::int64_t r = 0; r < runs; ++r) {
    std::int64_t offset = 0;
    std::int64_t rest = r;
    for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
      offset += dim->first * (rest % dim->second);
      rest /= dim->second;
    }
    const auto begin =
        reinterpret_cast<std::uintptr_t>(t.data) + static_cast<std::uintptr_t>(offset * element_size);
    extents.push_back({begin, begin + static_cast<std::uintptr_t>(run * element_size), at, written});
  }
}

std::optional<std::pair<At, At>> find_overlap(std::vector<Extent>& extents) {
  const auto by_begin = [](const Extent& l, const Extent& r) { return l.begin < r.begin; };
  if (!std::is_sorted(extents.begin(), extents.end(), by_begin))
    std::sort(extents.begin(), extents.end(), by_begin);
  const Extent* last_written = nullptr;
  const Extent* last_read = nullptr;
  for (const Extent& extent : extents) {
    if (last_written && extent.begin < last_written->end) return {{last_written->at, extent.at}};
    if (extent.written && last_read && extent.begin < last_read->end) return {{last_read->at, extent.at}};
    const Extent*& last = extent.written ? last_written : last_read;
    if (!last || extent.end > last->end) last = &extent;
  }
  return std::nullopt;
}

void refuse_overlap(const char* op, const std::optional<std::pair<At, At>>& overlap) {
  if (!overlap) return;
  fail(op, overlap->second, ": expected memory of its own, got memory shared with ", overlap->first,
       ", which the operator would change or read at the same time");
}

}  // namespace schedulefree
