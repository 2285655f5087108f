// CUDA's blocks and threads on the host: every thread of a block is a fiber, a barrier waits for all of them,
// an operation of a warp for its lanes, and threads run in an order that is random after every barrier.
// Kernels run as they are written; a barrier that not all threads reach ends the program.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// What the block before has left there is what nobody has written yet.
#define __shared__ static

namespace fiber {

struct Dim {
  unsigned x = 0;
};
inline Dim thread_index, block_index;

enum class At { kRunning, kBlock, kWarp, kDone };

struct Fiber {
  ucontext_t context;
  At at = At::kRunning;
  const void* site = nullptr;  // the barrier or operation where it waits
  std::uint32_t value = 0;     // what it brings to an operation of its warp
};
inline std::vector<Fiber> fibers;
inline std::vector<std::unique_ptr<char[]>> stacks;
constexpr std::size_t kStack = std::size_t{1} << 18;  // frames with sanitizers take four times their room
inline ucontext_t scheduler;
inline std::size_t current = 0;
inline std::function<void()> body;
inline std::mt19937 order(1);

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "fiber: %s (block %u, thread %u)\n", what, block_index.x, thread_index.x);
  std::abort();
}

inline void wait(At at, const void* site) {
  Fiber& self = fibers[current];
  self.at = at;
  self.site = site;
  swapcontext(&self.context, &scheduler);
}

inline void entry() {
  body();
  fibers[current].at = At::kDone;
  swapcontext(&fibers[current].context, &scheduler);
}

__attribute__((noinline)) inline void prepare(ucontext_t& context, char* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

// Lets the fibers [begin, end) go on that wait for each other, if they do.
inline bool release(std::size_t begin, std::size_t end, At at, const char* divided) {
  const auto waits = [at](const Fiber& f) { return f.at == at; };
  const auto first = fibers.begin() + static_cast<std::ptrdiff_t>(begin);
  const auto last = fibers.begin() + static_cast<std::ptrdiff_t>(end);
  const auto waiting = std::count_if(first, last, waits);
  if (waiting == 0) return false;
  if (waiting != last - first) fail(divided);
  for (auto f = first; f != last; ++f) {
    if (f->site != first->site) fail(divided);
    f->at = At::kRunning;
  }
  return true;
}

// Runs a block of threads.
inline void run_block(unsigned block, unsigned threads, std::function<void()> f) {
  constexpr std::size_t kWarp = 32;
  body = std::move(f);
  block_index.x = block;
  fibers.assign(threads, {});
  while (stacks.size() < threads) stacks.emplace_back(new char[kStack]);  // untouched pages take no memory
  std::vector<std::size_t> turn(threads);
  for (std::size_t t = 0; t < threads; ++t) {
    turn[t] = t;
    prepare(fibers[t].context, stacks[t].get());
  }
  while (true) {
    std::shuffle(turn.begin(), turn.end(), order);
    for (const std::size_t t : turn) {
      if (fibers[t].at != At::kRunning) continue;
      current = t;
      thread_index.x = static_cast<unsigned>(t);
      swapcontext(&scheduler, &fibers[t].context);
    }
    bool released = false;
    for (std::size_t w = 0; w < threads; w += kWarp) {
      released |= release(w, std::min<std::size_t>(w + kWarp, threads), At::kWarp,
                          "an operation of a warp that not all of its lanes reach");
    }
    if (!released) released = release(0, threads, At::kBlock, "a barrier that not all threads reach");
    if (!released) return;
  }
}

// Of the values that the lanes of a warp bring: what `combine(lane, value, result)` makes of them.
inline std::uint32_t largest_of_warp(std::uint32_t value, const void* site) {
  const std::size_t self = current, warp = self / 32 * 32;
  fibers[self].value = value;
  wait(At::kWarp, site);
  std::uint32_t most = 0;
  for (std::size_t t = warp; t < warp + 32; ++t) most = std::max(most, fibers[t].value);
  wait(At::kWarp, site);
  return most;
}

}  // namespace fiber

#define threadIdx fiber::thread_index
#define blockIdx fiber::block_index
#define __syncthreads()                    \
  do {                                     \
    static const char site = 0;            \
    fiber::wait(fiber::At::kBlock, &site); \
  } while (false)
#define __reduce_max_sync(mask, value)           \
  ([&] {                                         \
    static const char site = 0;                  \
    return fiber::largest_of_warp(value, &site); \
  }())
