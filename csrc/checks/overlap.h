// Whether tensors of a call share memory that one of them is going to change.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "checks/tensor_facts.h"

namespace schedulefree {

// Whether two indices may name one address. Views of as_strided that interleave without a collision
// count as overlapping: no slice, transpose or permutation produces one.
bool may_overlap_itself(const TensorInfo& t);

// A run of bytes that belongs to one tensor of the call.
struct Extent {
  std::uintptr_t begin;
  std::uintptr_t end;
  At at;
  bool written;
};

Extent bounding_extent(At at, const TensorInfo& t, std::int64_t element_size, bool contiguous, bool written);

// The exact memory of a tensor, as runs of its innermost dimension.
void append_runs(At at, const TensorInfo& t, std::int64_t element_size, bool written,
                 std::vector<Extent>& extents);

// Two extents of which one is written and which share a byte. Sorts the extents.
std::optional<std::pair<At, At>> find_overlap(std::vector<Extent>& extents);

// Refuses such a pair.
void refuse_overlap(const char* op, const std::optional<std::pair<At, At>>& overlap);

}  // namespace schedulefree
