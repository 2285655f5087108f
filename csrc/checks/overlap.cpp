#include "checks/overlap.h"

#include <algorithm>

namespace schedulefree {
namespace {

// Strides and sizes of the dimensions of more than one element, smallest stride first.
Dims dims_of(const TensorInfo& t) {
  Dims dims;
  for (std::int64_t d = 0; d < t.ndim; ++d) {
    if (t.sizes[d] != 1) dims.emplace_back(t.strides[d], t.sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  return dims;
}

}  // namespace

bool may_overlap_itself(const TensorInfo& t) {
  if (t.numel == 0) return false;
  std::int64_t extent = 1;
  for (const auto& [stride, size] : dims_of(t)) {
    if (stride < extent) return true;
    extent += stride * (size - 1);
  }
  return false;
}

Extent bounding_extent(At at, const TensorInfo& t, std::int64_t element_size, bool contiguous, bool written) {
  const std::int64_t last = contiguous ? t.numel - 1 : last_offset(t);
  const auto begin = reinterpret_cast<std::uintptr_t>(t.data);
  return {begin, begin + static_cast<std::uintptr_t>((last + 1) * element_size), at, written};
}

Runs runs_of(At at, const TensorInfo& t, std::int64_t element_size, bool written) {
  Runs runs{bounding_extent(at, t, element_size, false, written), 1, {}};
  for (const auto& [stride, size] : dims_of(t)) {
    if (stride == runs.length && runs.dims.empty())
      runs.length *= size;
    else if (stride != 0)
      runs.dims.emplace_back(stride * element_size, size);
  }
  runs.length *= element_size;
  return runs;
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

namespace {

// Whether their addresses differ even modulo strides that they share, as those of interleaved views do.
bool are_apart_by_strides(std::vector<Runs> all) {
  std::uintptr_t origin = all.front().bounds.begin;
  for (;;) {
    std::vector<Extent> extents;
    std::int64_t stride = 0;
    for (const Runs& runs : all) {
      extents.push_back(runs.bounds);
      if (!runs.dims.empty()) stride = std::max(stride, runs.dims.back().first);
    }
    if (!find_overlap(extents)) return true;
    if (stride == 0) return false;
    const auto period = static_cast<std::uintptr_t>(stride);
    for (Runs& runs : all) {
      auto& [begin, end, at, written] = runs.bounds;
      std::uintptr_t length = end - begin;
      for (; !runs.dims.empty() && runs.dims.back().first == stride; runs.dims.pop_back())
        length -= period * static_cast<std::uintptr_t>(runs.dims.back().second - 1);
      begin = (begin - origin) % period;
      end = begin + length;
      if (end > period) return false;
    }
    origin = 0;
  }
}

void append_each(const Runs& runs, std::vector<Extent>& extents) {
  std::int64_t count = 1;
  for (const auto& dim : runs.dims) count *= dim.second;
  for (std::int64_t r = 0; r < count; ++r) {
    std::int64_t offset = 0;
    std::int64_t rest = r;
    for (const auto& [stride, size] : runs.dims) {
      offset += stride * (rest % size);
      rest /= size;
    }
    const std::uintptr_t begin = runs.bounds.begin + static_cast<std::uintptr_t>(offset);
    extents.push_back(
        {begin, begin + static_cast<std::uintptr_t>(runs.length), runs.bounds.at, runs.bounds.written});
  }
}

}  // namespace

std::optional<std::pair<At, At>> find_overlap(std::vector<Runs>& all) {
  std::sort(all.begin(), all.end(),
            [](const Runs& l, const Runs& r) { return l.bounds.begin < r.bounds.begin; });
  for (auto first = all.begin(), last = first; first != all.end(); first = last) {
    // Those from first to last lie between one another.
    std::uintptr_t end = 0;
    for (last = first; last != all.end() && (last == first || last->bounds.begin < end); ++last)
      end = std::max(end, last->bounds.end);
    if (are_apart_by_strides({first, last})) continue;
    std::vector<Extent> extents;
    std::for_each(first, last, [&](const Runs& runs) { append_each(runs, extents); });
    if (const auto overlap = find_overlap(extents)) return overlap;
  }
  return std::nullopt;
}

void refuse_overlap(const char* op, const std::optional<std::pair<At, At>>& overlap) {
  if (!overlap) return;
  fail(op, overlap->second, ": expected memory of its own, got memory shared with ", overlap->first,
       ", which the operator would change or read at the same time");
}

}  // namespace schedulefree
