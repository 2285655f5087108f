// How one CUDA launch works on many tensors: a table of them in the kernel's arguments, from which a block
// finds its chunk of one tensor.
//
// Plain C++ but for the macro SCHEDULEFREE_MEMBER: built on the host, read on the device, tested without one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "update_math.h"

namespace schedulefree {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // elements that a thread moves at once
constexpr int kMaxStreams = 6;

// Sizes of the arguments of a kernel: with drivers from 12.1 on, and before.
constexpr std::size_t kLargeArguments = 32764;
constexpr std::size_t kSmallArguments = 4096;

// How tensors are cut into the pieces that blocks work on.
struct Chunks {
  std::int64_t dense, strided;  // elements per block, of tensors without gaps and with
  bool peels;                   // whether elements in front of the first aligned vector are kept apart
};

// A block that updates has one vector of each stream for every thread, and no loop: the next block's loads
// are under way while this one computes.
constexpr Chunks kUpdateChunks = {kThreads * kVector, kThreads, true};

// Blocks per launch.
constexpr std::uint32_t kMaxChunks = 0x7FFFFFFF;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

// Bytes to which a vector of such elements must be aligned: it is moved in pieces of at most 16.
constexpr std::int64_t vector_alignment(int element_size) {
  return element_size * kVector < 16 ? element_size * kVector : 16;
}

// What a block of a kernel works on: elements [-head, size) of every stream.
template <int streams>
struct DensePiece {
  static constexpr int kWidth = kVector;
  void* data[streams];
  std::int32_t size;
  std::int32_t head;        // in front of the vectors, 0 to 3; none but in the first chunk of a tensor
  std::uint32_t unaligned;  // a bit for each stream that has no aligned vectors

  template <typename T>
  SCHEDULEFREE_MEMBER T* at(int stream, std::int64_t i) const {
    return static_cast<T*>(data[stream]) + i;
  }
  SCHEDULEFREE_MEMBER bool aligned(int stream) const { return !(unaligned >> stream & 1); }
};

// Tensors of one kind, all of whose streams are dense. A structure of arrays: a block reads one of each.
template <int streams, int capacity>
struct TensorTable {
  static_assert(streams <= kMaxStreams, "a stream needs a bit of `alignment`");
  using Piece = DensePiece<streams>;
  static constexpr bool kDense = true;

  void* data[streams][capacity];        // where the vectors begin
  std::uint32_t first_chunk[capacity];  // of each tensor
  std::uint32_t last_size[capacity];    // elements in the last chunk of each tensor
  std::uint8_t alignment[capacity];     // head, and from bit 2 on `unaligned`
  std::uint32_t tensors;
  std::uint32_t chunks;
  std::int32_t chunk_size;

  void clear(std::int64_t elements_per_chunk) {
    tensors = 0;
    chunks = 0;
    chunk_size = static_cast<std::int32_t>(elements_per_chunk);
  }

  // Adds a tensor. Returns false, without effect, where the table or the launch would be too large. Unless it
  // `peels`, a piece has no head.
  bool append(void* const (&pointers)[streams], const int (&element_sizes)[streams], std::int64_t numel,
              bool peels = true) {
    if (numel == 0) return true;
    // As many elements go in front as leave the most streams with aligned vectors.
    int head = 0, best = -1;
    std::uint32_t unaligned = 0;
    const std::int64_t last = !peels ? 0 : numel < kVector ? numel : kVector - 1;
    for (int candidate = 0; candidate <= last && best < streams; ++candidate) {
      int aligned = 0;
      std::uint32_t others = 0;
      for (int s = 0; s < streams; ++s) {
        const auto begin = reinterpret_cast<std::uintptr_t>(pointers[s]) +
                           static_cast<std::uintptr_t>(candidate * element_sizes[s]);
        const bool fits = begin % static_cast<std::uintptr_t>(vector_alignment(element_sizes[s])) == 0;
        aligned += fits;
        if (!fits) others |= 1u << s;
      }
      if (aligned > best) {
        best = aligned;
        head = candidate;
        unaligned = others;
      }
    }
    const std::int64_t size = numel - head;
    const std::int64_t needed = std::max<std::int64_t>(1, ceil_div(size, chunk_size));
    if (tensors == capacity || needed > static_cast<std::int64_t>(kMaxChunks) - chunks) return false;
    for (int s = 0; s < streams; ++s)
      data[s][tensors] = static_cast<char*>(pointers[s]) + static_cast<std::int64_t>(head) * element_sizes[s];
    first_chunk[tensors] = chunks;
    last_size[tensors] = static_cast<std::uint32_t>(size - (needed - 1) * chunk_size);
    alignment[tensors] = static_cast<std::uint8_t>(static_cast<std::uint32_t>(head) | unaligned << 2);
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

  // The chunk of a block; `element_sizes` as in append().
  SCHEDULEFREE_MEMBER Piece piece(std::uint32_t chunk, const int (&element_sizes)[streams]) const {
    const std::uint32_t t = tensor_of(chunk);
    const std::uint32_t within = chunk - first_chunk[t];
    const std::uint32_t end = t + 1 < tensors ? first_chunk[t + 1] : chunks;
    const std::int64_t begin = static_cast<std::int64_t>(within) * chunk_size;
    Piece piece;
    for (int s = 0; s < streams; ++s)
      piece.data[s] = static_cast<char*>(data[s][t]) + begin * element_sizes[s];
    piece.size = chunk + 1 == end ? static_cast<std::int32_t>(last_size[t]) : chunk_size;
    piece.head = within == 0 ? alignment[t] & 3 : 0;
    piece.unaligned = alignment[t] >> 2;
    return piece;
  }
};

// Dimensions of more than one element that an iteration may have once they are merged: each doubles the size
// of a tensor at least, so that no memory holds one of more.
constexpr int kMaxDims = 48;

template <int streams>
struct StridedTensor;

// As DensePiece, of streams that may have gaps.
template <int streams>
struct StridedPiece {
  static constexpr int kWidth = 1;
  static constexpr std::int32_t head = 0;
  const StridedTensor<streams>* tensor;
  std::int64_t begin;
  std::int32_t size;

  template <typename T>
  SCHEDULEFREE_MEMBER T* at(int stream, std::int64_t i) const {
    return static_cast<T*>(tensor->data[stream]) + tensor->offset(stream, begin + i);
  }
  SCHEDULEFREE_MEMBER bool aligned(int) const { return true; }
};

// One tensor, any of whose streams may have gaps. The counterpart of TensorTable for what is rare.
template <int streams>
struct StridedTensor {
  using Piece = StridedPiece<streams>;
  static constexpr bool kDense = false;

  void* data[streams];
  std::int64_t sizes[kMaxDims];             // outermost first
  std::int64_t strides[streams][kMaxDims];  // elements
  std::int64_t numel;
  std::uint32_t chunks;
  std::int32_t chunk_size;
  std::int32_t ndim;

  SCHEDULEFREE_MEMBER std::int64_t offset(int stream, std::int64_t i) const {
    std::int64_t offset = 0;
    for (std::int32_t d = ndim - 1; d >= 0; --d) {
      offset += i % sizes[d] * strides[stream][d];
      i /= sizes[d];
    }
    return offset;
  }

  SCHEDULEFREE_MEMBER Piece piece(std::uint32_t chunk, const int (&)[streams]) const {
    const std::int64_t begin = static_cast<std::int64_t>(chunk) * chunk_size;
    const std::int64_t left = numel - begin;
    return {this, begin, left < chunk_size ? static_cast<std::int32_t>(left) : chunk_size};
  }
};

// How many tensors fit beside `other` bytes of arguments.
constexpr int table_capacity(std::size_t arguments, int streams, std::size_t other) {
  constexpr std::size_t kFixed = 3 * sizeof(std::uint32_t) + 8;  // the counters, and padding
  const std::size_t per_tensor =
      static_cast<std::size_t>(streams) * sizeof(void*) + 2 * sizeof(std::uint32_t) + 1;
  return static_cast<int>((arguments - other - kFixed - alignof(void*)) / per_tensor);
}

}  // namespace schedulefree
