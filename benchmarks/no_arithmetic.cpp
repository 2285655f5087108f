// The ceiling for the CPU steps: loops that move the same memory and compute nothing worth naming.
//
// Contract, for every function here but the last: stream k of tensor i holds numel[i] elements of 32 bits,
// and streams do not overlap. Work is split over torch's thread pool as csrc/cpu/ops_cpu.cpp splits it. The
// contents are taken as bits, and calling a function a second time gives them back: any number of calls costs
// the same, with no NaN and no subnormal to slow one down.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

// The loop runs in the widest vectors of the processor, as the kernels of csrc/cpu/ do.
#if defined(__x86_64__) && defined(__GLIBC__)
#define WIDEST_VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDEST_VECTORS
#endif

namespace schedulefree {
namespace {

using std::int64_t;
using std::uint32_t;

// Elements per unit of work.
constexpr int64_t kBlock = 1024;

WIDEST_VECTORS void adamw_loop(int64_t n, uint32_t* __restrict y, const uint32_t* __restrict grad,
                               uint32_t* __restrict z, uint32_t* __restrict v) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t g = grad[i];
    y[i] ^= g;
    z[i] ^= g;
    v[i] ^= g;
  }
}

WIDEST_VECTORS void sgd_loop(int64_t n, uint32_t* __restrict y, const uint32_t* __restrict grad,
                             uint32_t* __restrict z) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t g = grad[i];
    y[i] ^= g;
    z[i] ^= g;
  }
}

WIDEST_VECTORS void swap_loop(int64_t n, uint32_t* __restrict y, const uint32_t* __restrict z) {
  for (int64_t i = 0; i < n; ++i) y[i] ^= z[i];
}

WIDEST_VECTORS void exchange_loop(int64_t n, uint32_t* __restrict y, uint32_t* __restrict z) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t word = y[i];
    y[i] = z[i];
    z[i] = word;
  }
}

// All words of an array, in one.
WIDEST_VECTORS uint32_t gathered(int64_t n, const uint32_t* __restrict words) {
  uint32_t all = 0;
  for (int64_t i = 0; i < n; ++i) all ^= words[i];
  return all;
}

WIDEST_VECTORS void xor_loop(int64_t n, uint32_t* __restrict words, uint32_t with) {
  for (int64_t i = 0; i < n; ++i) words[i] ^= with;
}

// Runs `loop(tensor, begin, n)` over all blocks of all tensors.
template <typename Loop>
void for_each_block(int64_t tensors, const int64_t* numel, const Loop& loop) {
  std::vector<int64_t> first_block = {0};  // of each tensor, and the end
  for (int64_t i = 0; i < tensors; ++i)
    first_block.push_back(first_block.back() + (numel[i] + kBlock - 1) / kBlock);

  torch::stable::parallel_for(0, first_block.back(), /*grain_size=*/1, [&](int64_t begin, int64_t end) {
    auto next = std::upper_bound(first_block.begin(), first_block.end(), begin);
    for (int64_t block = begin; block < end; ++next) {
      const int64_t tensor = next - first_block.begin() - 1;
      const int64_t tensor_end = std::min(*next, end);
      for (; block < tensor_end; ++block) {
        const int64_t offset = (block - *(next - 1)) * kBlock;
        loop(tensor, offset, std::min(kBlock, numel[tensor] - offset));
      }
    }
  });
}

}  // namespace
}  // namespace schedulefree

#define EXPORT extern "C" __attribute__((visibility("default")))

// 4 reads, 3 writes.
EXPORT void schedulefree_ceiling_adamw(std::int64_t tensors, const std::int64_t* numel,
                                       std::uint32_t* const* y, const std::uint32_t* const* grad,
                                       std::uint32_t* const* z, std::uint32_t* const* v) {
  schedulefree::for_each_block(tensors, numel, [=](std::int64_t t, std::int64_t begin, std::int64_t n) {
    schedulefree::adamw_loop(n, y[t] + begin, grad[t] + begin, z[t] + begin, v[t] + begin);
  });
}

// 3 reads, 2 writes.
EXPORT void schedulefree_ceiling_sgd(std::int64_t tensors, const std::int64_t* numel, std::uint32_t* const* y,
                                     const std::uint32_t* const* grad, std::uint32_t* const* z) {
  schedulefree::for_each_block(tensors, numel, [=](std::int64_t t, std::int64_t begin, std::int64_t n) {
    schedulefree::sgd_loop(n, y[t] + begin, grad[t] + begin, z[t] + begin);
  });
}

// 2 reads, 1 write.
EXPORT void schedulefree_ceiling_swap(std::int64_t tensors, const std::int64_t* numel,
                                      std::uint32_t* const* y, const std::uint32_t* const* z) {
  schedulefree::for_each_block(tensors, numel, [=](std::int64_t t, std::int64_t begin, std::int64_t n) {
    schedulefree::swap_loop(n, y[t] + begin, z[t] + begin);
  });
}

// 2 reads, 2 writes.
EXPORT void schedulefree_ceiling_exchange(std::int64_t tensors, const std::int64_t* numel,
                                          std::uint32_t* const* y, std::uint32_t* const* z) {
  schedulefree::for_each_block(tensors, numel, [=](std::int64_t t, std::int64_t begin, std::int64_t n) {
    schedulefree::exchange_loop(n, y[t] + begin, z[t] + begin);
  });
}

// Streams of any format: stream k has bytes[k] for 1024 elements, a multiple of 4. The first is only read,
// the others are read and written. numel[i] is a multiple of 1024.
EXPORT void schedulefree_ceiling_streams(std::int64_t tensors, const std::int64_t* numel,
                                         std::int64_t streams, const std::int64_t* bytes,
                                         std::uint32_t* const* const* data) {
  schedulefree::for_each_block(tensors, numel, [=](std::int64_t t, std::int64_t begin, std::int64_t) {
    std::uint32_t with = 0;
    for (std::int64_t k = 0; k < streams; ++k) {
      const std::int64_t words = bytes[k] / 4;
      std::uint32_t* const block = data[k][t] + begin / schedulefree::kBlock * words;
      if (k == 0) {
        with = schedulefree::gathered(words, block);
      } else {
        schedulefree::xor_loop(words, block, with);
      }
    }
  });
}
