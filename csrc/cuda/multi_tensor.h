// How one CUDA launch works on many tensors: a table of them in the kernel's arguments, from which a block
// finds its chunk of one tensor.
//
// Plain C++ but for the macro SCHEDULEFREE_MEMBER: built on the host, read on the device, tested without one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "storage.h"

namespace schedulefree {

constexpr int kThreads = 256;
constexpr int kVector = 4;  // elements that a thread moves at once
constexpr int kMaxStreams = 8;

// The element size of a stream that is not cut into pieces.
constexpr int kWholeTensor = 0;

// Sizes of the arguments of a kernel: with drivers from 12.1 on, and before.
constexpr std::size_t kLargeArguments = 32764;
constexpr std::size_t kSmallArguments = 4096;

// Elements that a block updates: one vector of each stream for every thread, and no loop, so that the next
// block's loads are under way while this one computes.
constexpr std::int64_t kUpdateChunk = kThreads * kVector;
static_assert(Moment8::kBlock == 32 * kVector, "a warp has one block of an 8-bit second moment");

// Blocks per launch.
constexpr std::uint32_t kMaxChunks = 0x7FFFFFFF;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

// Bytes to which a vector of such elements must be aligned: it is moved in pieces of at most 16.
constexpr std::int64_t vector_alignment(int element_size) {
  return element_size * kVector < 16 ? element_size * kVector : 16;
}

// What a block of a kernel works on: elements [0, size) of every stream.
template <int streams>
struct DensePiece {
  void* data[streams];
  std::int64_t begin;  // the first element, counted through the tensor
  std::int32_t size;
  std::uint32_t unaligned;  // a bit for each stream that has no aligned vectors

  // Where element i of a stream of T lies.
  template <typename As, typename T>
  SCHEDULEFREE_MEMBER As* at(int stream, std::int32_t i) const {
    return reinterpret_cast<As*>(static_cast<T*>(data[stream]) + i);
  }
  SCHEDULEFREE_MEMBER void* whole(int stream) const { return data[stream]; }
  SCHEDULEFREE_MEMBER bool aligned(int stream) const { return !(unaligned >> stream & 1); }
};

// Tensors of one kind, all of whose streams are dense. A structure of arrays: a block reads one of each.
template <int streams, int capacity>
struct TensorTable {
  static_assert(streams <= kMaxStreams, "a stream needs a bit of `unaligned`");
  using Piece = DensePiece<streams>;
  static constexpr bool kDense = true;

  void* data[streams][capacity];
  std::uint32_t first_chunk[capacity];  // of each tensor
  std::uint32_t last_size[capacity];    // elements in the last chunk of each tensor
  std::uint8_t unaligned[capacity];     // as in a piece
  std::uint32_t tensors;
  std::uint32_t chunks;
  std::int32_t chunk_size;

  void clear(std::int64_t elements_per_chunk) {
    tensors = 0;
    chunks = 0;
    chunk_size = static_cast<std::int32_t>(elements_per_chunk);
  }

  // Adds a tensor. Returns false, without effect, where the table or the launch would be too large.
  bool append(void* const (&pointers)[streams], const int (&element_sizes)[streams], std::int64_t numel) {
    if (numel == 0) return true;
    const std::int64_t needed = ceil_div(numel, chunk_size);
    if (tensors == capacity || needed > static_cast<std::int64_t>(kMaxChunks) - chunks) return false;
    std::uint32_t others = 0;
    for (int s = 0; s < streams; ++s) {
      data[s][tensors] = pointers[s];
      if (element_sizes[s] == kWholeTensor) continue;
      const auto alignment = static_cast<std::uintptr_t>(vector_alignment(element_sizes[s]));
      if (reinterpret_cast<std::uintptr_t>(pointers[s]) % alignment != 0) others |= 1u << s;
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

  // The chunk of a block; `element_sizes` as in append().
  SCHEDULEFREE_MEMBER Piece piece(std::uint32_t chunk, const int (&element_sizes)[streams]) const {
    const std::uint32_t t = tensor_of(chunk);
    const std::uint32_t within = chunk - first_chunk[t];
    const std::uint32_t end = t + 1 < tensors ? first_chunk[t + 1] : chunks;
    Piece piece;
    piece.begin = static_cast<std::int64_t>(within) * chunk_size;
    for (int s = 0; s < streams; ++s)
      piece.data[s] = static_cast<char*>(data[s][t]) + piece.begin * element_sizes[s];
    piece.size = chunk + 1 == end ? static_cast<std::int32_t>(last_size[t]) : chunk_size;
    piece.unaligned = unaligned[t];
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
  const StridedTensor<streams>* tensor;
  std::int64_t begin;
  std::int32_t size;

  template <typename As, typename T>
  SCHEDULEFREE_MEMBER As* at(int stream, std::int32_t i) const {
    return reinterpret_cast<As*>(static_cast<T*>(tensor->data[stream]) + tensor->offset(stream, begin + i));
  }
  SCHEDULEFREE_MEMBER void* whole(int stream) const { return tensor->data[stream]; }
  SCHEDULEFREE_MEMBER bool aligned(int) const { return false; }
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
