// How one launch works on many tensors: a table of them in the kernel's arguments, from which a block finds
// its chunk of one tensor. Built on the host, read on the device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "storage.h"

namespace schedulefree {

constexpr int kThreads = 256;        // of a block
constexpr int kTotalThreads = 1024;  // of the block that adds up totals
constexpr int kVector = 4;           // elements that a thread moves at once

// The streams of a parameter. A kernel's tables hold those that it reads or writes, in this order.
enum StreamId : unsigned { kY, kGrad, kZ, kV, kM, kScale, kYLow, kZLow, kStreamIds };

// A set of streams has a bit for each.
constexpr unsigned only(StreamId id) { return 1u << id; }

// The place of a stream among those of a set: how many come before it. Without a loop, which the compiler
// unrolls too late to keep a piece's pointers in registers.
SCHEDULEFREE_INLINE constexpr int place_of(StreamId id, unsigned set) {
  static_assert(kStreamIds <= 8);
  unsigned counts = set & ((1u << id) - 1);
  counts = (counts & 0x55u) + (counts >> 1 & 0x55u);
  counts = (counts & 0x33u) + (counts >> 2 & 0x33u);
  return static_cast<int>((counts & 0x0Fu) + (counts >> 4));
}
constexpr int count_of(unsigned set) { return place_of(kStreamIds, set); }

// Sizes of the arguments of a kernel: with drivers from 12.1 on, and before.
constexpr std::size_t kLargeArguments = 32764;
constexpr std::size_t kSmallArguments = 4096;

// Elements that a block updates: one vector of each stream for every thread, and no loop, so that the next
// block's loads are under way while this one computes.
constexpr std::int64_t kUpdateChunk = kThreads * kVector;
static_assert(Moment8::kBlock == 32 * kVector, "a warp has one block of an 8-bit second moment");

// Elements per partial sum. The same for every GPU, and so are the sums.
constexpr std::int64_t kSumChunk = 8192;

// Blocks per launch.
constexpr std::uint32_t kMaxChunks = 0x7FFFFFFF;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

// What a block works on: elements [begin, begin + size) of every stream.
template <unsigned set>
struct DensePiece {
  void* data[count_of(set)];  // of the whole tensor
  std::int64_t begin;
  std::int32_t size;
  std::uint32_t unaligned;  // a bit for each stream that has no aligned vectors

  // Where element i of the piece lies in a stream of T.
  template <typename T>
  SCHEDULEFREE_MEMBER T* at(StreamId id, std::int32_t i) const {
    return static_cast<T*>(data[place_of(id, set)]) + begin + i;
  }
  // A stream that does not have one element for each of the tensor's.
  template <typename T>
  SCHEDULEFREE_MEMBER T* whole(StreamId id) const {
    return static_cast<T*>(data[place_of(id, set)]);
  }
  SCHEDULEFREE_MEMBER bool aligned(StreamId id) const { return !(unaligned >> place_of(id, set) & 1); }
};

// Tensors of one kind, all of whose streams are dense. A structure of arrays: a block reads one of each.
template <int streams, int capacity>
struct TensorTable {
  void* data[streams][capacity];
  std::uint32_t first_chunk[capacity];  // of each tensor
  std::uint32_t last_size[capacity];    // elements in the last chunk of each tensor
  std::uint8_t unaligned[capacity];     // as in a piece
  std::uint32_t tensors = 0;
  std::uint32_t chunks = 0;
  std::int32_t chunk_size;

  explicit TensorTable(std::int64_t elements_per_chunk)
      : chunk_size(static_cast<std::int32_t>(elements_per_chunk)) {}

  // Adds a tensor with elements. Returns false, without effect, where the table or the launch would be too
  // large.
  bool append(void* const* pointers, const int* element_sizes, std::int64_t numel) {
    const std::int64_t needed = ceil_div(numel, chunk_size);
    if (tensors == capacity || needed > static_cast<std::int64_t>(kMaxChunks) - chunks) return false;
    std::uint32_t others = 0;
    for (int s = 0; s < streams; ++s) {
      data[s][tensors] = pointers[s];
      // A vector is moved in pieces of at most 16 bytes.
      const int vector = element_sizes[s] * kVector < 16 ? element_sizes[s] * kVector : 16;
      if (reinterpret_cast<std::uintptr_t>(pointers[s]) % static_cast<unsigned>(vector) != 0)
        others |= 1u << s;
    }
    first_chunk[tensors] = chunks;
    last_size[tensors] = static_cast<std::uint32_t>(numel - (needed - 1) * chunk_size);
    unaligned[tensors] = static_cast<std::uint8_t>(others);
    chunks += static_cast<std::uint32_t>(needed);
    ++tensors;
    return true;
  }

  // The tensor that a chunk belongs to: the last that begins at or before it.
  SCHEDULEFREE_MEMBER std::uint32_t tensor_of(std::uint32_t chunk) const {
    std::uint32_t low = 0, high = tensors;
    while (high - low > 1) {
      const std::uint32_t middle = low + (high - low) / 2;
      (first_chunk[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }

  // The chunk of a block.
  template <unsigned set>
  SCHEDULEFREE_MEMBER DensePiece<set> piece(std::uint32_t chunk) const {
    static_assert(count_of(set) == streams, "the table has what the kernel reads and writes");
    const std::uint32_t t = tensor_of(chunk);
    const std::uint32_t within = chunk - first_chunk[t];
    const std::uint32_t end = t + 1 < tensors ? first_chunk[t + 1] : chunks;
    DensePiece<set> piece;
    for (int s = 0; s < streams; ++s) piece.data[s] = data[s][t];
    piece.begin = static_cast<std::int64_t>(within) * chunk_size;
    piece.size = chunk + 1 == end ? static_cast<std::int32_t>(last_size[t]) : chunk_size;
    piece.unaligned = unaligned[t];
    return piece;
  }
};

// What a kernel takes beside its table, at most.
constexpr std::size_t kScalarArguments = 256;

// How many tensors fit.
constexpr int capacity_of(int streams, std::size_t arguments) {
  constexpr std::size_t kFixed = 3 * sizeof(std::uint32_t) + 8;  // the counters, and padding
  const std::size_t per_tensor =
      static_cast<std::size_t>(streams) * sizeof(void*) + 2 * sizeof(std::uint32_t) + 1;
  return static_cast<int>((arguments - kScalarArguments - kFixed - alignof(void*)) / per_tensor);
}
template <int streams>
using LargeTable = TensorTable<streams, capacity_of(streams, kLargeArguments)>;
template <int streams>
using SmallTable = TensorTable<streams, capacity_of(streams, kSmallArguments)>;

// Dimensions of more than one element that an iteration may have once they are merged: each doubles the size
// of a tensor at least, so that no memory holds one of more.
constexpr int kMaxDims = 48;

template <int streams>
struct StridedTensor;

// As DensePiece, of streams that may have gaps.
template <unsigned set>
struct StridedPiece {
  const StridedTensor<count_of(set)>* tensor;
  std::int64_t begin;
  std::int32_t size;

  template <typename T>
  SCHEDULEFREE_MEMBER T* at(StreamId id, std::int32_t i) const {
    return whole<T>(id) + tensor->offset(place_of(id, set), begin + i);
  }
  template <typename T>
  SCHEDULEFREE_MEMBER T* whole(StreamId id) const {
    return static_cast<T*>(tensor->data[place_of(id, set)]);
  }
  SCHEDULEFREE_MEMBER bool aligned(StreamId) const { return false; }
};

// One tensor, any of whose streams may have gaps. The counterpart of TensorTable for what is rare.
template <int streams>
struct StridedTensor {
  void* data[streams];
  std::int64_t sizes[kMaxDims];             // outermost first
  std::int64_t strides[streams][kMaxDims];  // elements
  std::int64_t numel;
  std::uint32_t chunks;
  std::int32_t chunk_size;
  std::int32_t ndim;

  // Not inlined: its divisions would be most of a kernel's code.
  SCHEDULEFREE_NOINLINE std::int64_t offset(int place, std::int64_t i) const {
    std::int64_t offset = 0;
    for (std::int32_t d = ndim - 1; d >= 0; --d) {
      offset += i % sizes[d] * strides[place][d];
      i /= sizes[d];
    }
    return offset;
  }

  template <unsigned set>
  SCHEDULEFREE_MEMBER StridedPiece<set> piece(std::uint32_t chunk) const {
    const std::int64_t begin = static_cast<std::int64_t>(chunk) * chunk_size;
    const std::int64_t left = numel - begin;
    return {this, begin, left < chunk_size ? static_cast<std::int32_t>(left) : chunk_size};
  }
};

}  // namespace schedulefree
