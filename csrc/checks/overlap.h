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

// Bytes from one index to the next, or elements, and the number of indices.
using Dims = std::vector<std::pair<std::int64_t, std::int64_t>>;

// The exact memory of a tensor that has elements.
struct Runs {
  Extent bounds;
  std::int64_t length;  // of one run
  Dims dims;            // in bytes, smallest first, by which a run repeats
};

Runs runs_of(At at, const TensorInfo& t, std::int64_t element_size, bool written);

// Two extents of which one is written and which share a byte. Sorts the extents.
std::optional<std::pair<At, At>> find_overlap(std::vector<Extent>& extents);

// The same of tensors whose bounds may cross where their elements do not. Takes a run at a time only where
// the strides do not tell. Sorts the tensors.
std::optional<std::pair<At, At>> find_overlap(std::vector<Runs>& all);

// Refuses such a pair.
void refuse_overlap(const char* op, const std::optional<std::pair<At, At>>& overlap);

}  // namespace schedulefree
