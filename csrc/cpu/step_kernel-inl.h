// The CPU kernels, compiled once per instruction set: the including file defines SCHEDULEFREE_ISA.
//
// No include guard: each inclusion is a namespace of its own. Nothing here may instantiate a template of
// the standard library: its code would be shared between units, and a unit for AVX-512 could lend it to
// the baseline.
#include "cpu/isa_dispatch.h"
#include "step_args.h"
#include "update_math.h"

#ifndef SCHEDULEFREE_ISA
#error "define SCHEDULEFREE_ISA before including step_kernel-inl.h"
#endif

namespace schedulefree {
namespace SCHEDULEFREE_ISA {
namespace {

using std::int16_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

// ---- streams ---------------------------------------------------------------------------------------
//
// The arithmetic runs on dense arrays of Real. A stream that already is one is used where it lies; any
// other is brought into a block-sized array that stays in the first-level cache, and written back.

// Calls `copy(offset, stride, n, at)` for every run of the innermost dimension in [begin, begin + n).
template <typename Copy>
void for_each_run(const TensorArgs& t, const int64_t* strides, int64_t begin, int64_t n, const Copy& copy) {
  const int64_t inner = t.ndim - 1;
  for (int64_t done = 0; done < n;) {
    int64_t rest = begin + done;
    int64_t offset = 0;
    int64_t column = 0;
    for (int64_t d = inner; d >= 0; --d) {
      const int64_t index = rest % t.sizes[d];
      rest /= t.sizes[d];
      offset += index * strides[d];
      if (d == inner) column = index;
    }
    const int64_t left_in_row = t.sizes[inner] - column;
    const int64_t run = left_in_row < n - done ? left_in_row : n - done;
    copy(offset, strides[inner], run, done);
    done += run;
  }
}

// The elements [begin, begin + n) of a stream, dense: in place, or gathered into `scratch`.
template <typename T>
T* gather(const TensorArgs& t, const Stream& s, int64_t begin, int64_t n, T* scratch) {
  T* const data = static_cast<T*>(s.data);
  if (!s.strides) return data + begin;
  for_each_run(t, s.strides, begin, n, [=](int64_t offset, int64_t stride, int64_t run, int64_t at) {
    for (int64_t i = 0; i < run; ++i) scratch[at + i] = data[offset + i * stride];
  });
  return scratch;
}

// The way back; nothing to do where gather() gave the elements in place.
template <typename T>
void scatter(const TensorArgs& t, const Stream& s, int64_t begin, int64_t n, const T* from) {
  if (!s.strides) return;
  T* const data = static_cast<T*>(s.data);
  for_each_run(t, s.strides, begin, n, [=](int64_t offset, int64_t stride, int64_t run, int64_t at) {
    for (int64_t i = 0; i < run; ++i) data[offset + i * stride] = from[at + i];
  });
}

// One block of a stream of Real, of a gradient, or of a parameter that may be kept in 16 bits.
template <typename Real>
struct Block {
  alignas(64) Real wide[kBlock];
  alignas(64) uint16_t narrow[kBlock];
  alignas(64) int16_t low[kBlock];
};

inline float* load_wide(const TensorArgs& t, const Stream& s, const Stream& lo, int64_t begin, int64_t n,
                        Block<float>& block) {
  if (s.dtype == DType::kFloat32) return gather(t, s, begin, n, block.wide);
  const uint16_t* const h = gather(t, s, begin, n, block.narrow);
  float* const wide = block.wide;
  if (s.dtype == DType::kFloat16) {
    for (int64_t i = 0; i < n; ++i) wide[i] = fp16_to_float(h[i]);
  } else if (lo.data) {
    const int16_t* const l = gather(t, lo, begin, n, block.low);
    for (int64_t i = 0; i < n; ++i) wide[i] = join_float(h[i], l[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) wide[i] = bf16_to_float(h[i]);
  }
  return wide;
}

inline double* load_wide(const TensorArgs& t, const Stream& s, const Stream&, int64_t begin, int64_t n,
                         Block<double>& block) {
  return gather(t, s, begin, n, block.wide);
}

inline void store_wide(const TensorArgs& t, const Stream& s, const Stream& lo, int64_t begin, int64_t n,
                       const float* wide, Block<float>& block) {
  if (s.dtype == DType::kFloat32) return scatter(t, s, begin, n, wide);
  uint16_t* const h = s.strides ? block.narrow : static_cast<uint16_t*>(s.data) + begin;
  if (s.dtype == DType::kFloat16) {
    for (int64_t i = 0; i < n; ++i) h[i] = float_to_fp16(wide[i]);
  } else if (lo.data) {
    int16_t* const l = lo.strides ? block.low : static_cast<int16_t*>(lo.data) + begin;
    for (int64_t i = 0; i < n; ++i) split_float(wide[i], h[i], l[i]);
    scatter(t, lo, begin, n, l);
  } else {
    for (int64_t i = 0; i < n; ++i) h[i] = float_to_bf16(wide[i]);
  }
  scatter(t, s, begin, n, h);
}

inline void store_wide(const TensorArgs& t, const Stream& s, const Stream&, int64_t begin, int64_t n,
                       const double* wide, Block<double>&) {
  scatter(t, s, begin, n, wide);
}

// Calls `call(storage)` with what a value becomes in the memory of a parameter.
template <typename Call>
void with_storage(const TensorArgs& t, float, const Call& call) {
  if (t.y.dtype == DType::kFloat16) {
    call(ThroughFp16{});
  } else if (t.y.dtype == DType::kBFloat16 && !t.y_lo.data) {
    call(ThroughBf16{});
  } else {
    call(AsItIs{});
  }
}

template <typename Call>
void with_storage(const TensorArgs&, double, const Call& call) {
  call(AsItIs{});
}

constexpr Stream kNoStream{};

// ---- loops -----------------------------------------------------------------------------------------

// Updates elements, and tells of each in `moves` what may_move() says of it.
template <DecayAt decay_at, typename Real, typename Storage>
void sgd_loop(int64_t n, Real* __restrict y, const Real* __restrict grad, Real* __restrict z,
              uint8_t* __restrict moves, const StepCoefs<Real> s, const Storage through) {
  for (int64_t i = 0; i < n; ++i) {
    sgd_update(y[i], grad[i], z[i], decay_at, s);
    moves[i] = may_move(y[i], z[i], s.settle, through);
  }
}

template <DecayAt decay_at, bool has_inner, typename Real, typename Storage>
void adamw_loop(int64_t n, Real* __restrict y, const Real* __restrict grad, Real* __restrict z,
                Real* __restrict v, Real* __restrict m, uint8_t* __restrict moves, const StepCoefs<Real> s,
                const AdamCoefs<Real> adam, const Storage through) {
  Real unused = 0;
  for (int64_t i = 0; i < n; ++i) {
    adamw_update<has_inner>(y[i], grad[i], z[i], v[i], has_inner ? m[i] : unused, decay_at, s, adam);
    moves[i] = may_move(y[i], z[i], s.settle, through);
  }
}

// Elements that are settled together.
constexpr int64_t kSettled = 16;
static_assert(kBlock % kSettled == 0, "a block's worth of elements is settled in whole groups");

// Bit for bit what settle() makes of each.
template <typename Real, typename Storage>
void settle_loop(int64_t n, Real* __restrict y, const Real* __restrict z, const SettleCoefs& s,
                 const Storage& through) {
  int64_t i = 0;
  for (; i + kSettled <= n; i += kSettled) {
    uint32_t again = 0;
    for (int64_t j = i; j < i + kSettled; ++j) y[j] = round_trip(through(y[j]), z[j], s, through, again);
    if (!again) continue;
    for (int64_t j = i; j < i + kSettled; ++j) y[j] = round_trip(y[j], z[j], s, through, again);
  }
  for (; i < n; ++i) y[i] = settle(y[i], z[i], s, through);
}

// What may_move() says of the elements of a block. Zeros follow, so that it is read in whole rows.
constexpr int64_t kRow = 16;
using Moves = uint8_t[kBlock + kRow];

// Writes the positions of the elements that may move to `at`; returns how many there are.
inline int64_t find_moves(int64_t n, Moves& moves, uint16_t* at) {
  memset(moves + n, 0, kRow);
  int64_t count = 0;
  for (int64_t row = 0; row < n; row += kRow) {
    uint64_t halves[2];
    static_assert(sizeof(halves) == kRow, "a row is read at once");
    memcpy(halves, moves + row, kRow);
    if ((halves[0] | halves[1]) == 0) continue;
    for (int64_t i = row; i < row + kRow; ++i) {
      at[count] = static_cast<uint16_t>(i);
      count += moves[i] != 0;
    }
  }
  return count;
}

// Settles a block. The few elements that may move are brought together, then put back.
template <typename Storage>
void settle_block(int64_t n, float* __restrict y, const float* __restrict z, Moves& moves,
                  const SettleCoefs& s, const Storage& through) {
  if (always_moves(s, through)) return settle_loop(n, y, z, s, through);
  uint16_t at[kBlock];
  int64_t count = find_moves(n, moves, at);
  if (count == 0) return;
  while (count % kSettled) at[count++] = at[0];
  alignas(64) float y_moved[kBlock], z_moved[kBlock];
  int64_t gathered = 0;
  do {
    y_moved[gathered] = y[at[gathered]];
    z_moved[gathered] = z[at[gathered]];
  } while (++gathered < count);
  settle_loop(count, y_moved, z_moved, s, through);
  for (int64_t i = 0; i < count; ++i) y[at[i]] = y_moved[i];
}

template <typename Storage>
void settle_block(int64_t n, double* y, const double* z, Moves&, const SettleCoefs& s,
                  const Storage& through) {
  settle_loop(n, y, z, s, through);
}

template <typename Real>
void swap_loop(int64_t n, Real* __restrict p, const Real* __restrict z, const SwapScalars swap) {
  for (int64_t i = 0; i < n; ++i) p[i] = swapped(p[i], z[i], swap);
}

// Sums kLanes interleaved partial sums, so that the order of additions, and with it every bit, is the same
// whatever the width of the vectors.
constexpr int64_t kLanes = 16;

template <typename Real>
void polyak_loop(int64_t n, const Real* __restrict y, const Real* __restrict grad, const Real* __restrict z,
                 double* __restrict absolute, double* __restrict inner) {
  const auto add = [&](int64_t i, int64_t lane) {
    const double g = static_cast<double>(grad[i]);
    absolute[lane] += g < 0 ? -g : g;
    inner[lane] += g * (static_cast<double>(z[i]) - static_cast<double>(y[i]));
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) add(i, lane);
}

template <typename Real>
void squares_loop(int64_t n, const Real* __restrict grad, double* __restrict squares) {
  const auto add = [&](int64_t i, int64_t lane) {
    const double g = static_cast<double>(grad[i]);
    squares[lane] += g * g;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) add(i, lane);
}

// Adds the lanes up in pairs of pairs.
inline double sum_lanes(double* lanes) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// ---- one block of one parameter --------------------------------------------------------------------

template <typename Real>
void sgd_block(const TensorArgs& t, int64_t begin, int64_t n, const StepScalars& step) {
  Block<Real> y_block, grad_block;
  alignas(64) Real z_wide[kBlock];
  Real* const y = load_wide(t, t.y, t.y_lo, begin, n, y_block);
  const Real* const grad = load_wide(t, t.grad, kNoStream, begin, n, grad_block);
  Real* const z = gather(t, t.z, begin, n, z_wide);
  const StepCoefs<Real> s(step);
  Moves moves;
  with_storage(t, Real{}, [&](auto through) {
    switch (step.decay_at) {
      case DecayAt::kNowhere:
        sgd_loop<DecayAt::kNowhere>(n, y, grad, z, moves, s, through);
        break;
      case DecayAt::kY:
        sgd_loop<DecayAt::kY>(n, y, grad, z, moves, s, through);
        break;
      case DecayAt::kZ:
        sgd_loop<DecayAt::kZ>(n, y, grad, z, moves, s, through);
        break;
    }
    settle_block(n, y, z, moves, s.settle, through);
  });
  store_wide(t, t.y, t.y_lo, begin, n, y, y_block);
  scatter(t, t.z, begin, n, z);
}

template <bool has_inner, typename Real>
void adamw_block(const TensorArgs& t, int64_t begin, int64_t n, const StepScalars& step,
                 const AdamScalars& adam) {
  Block<Real> y_block, grad_block;
  alignas(64) Real z_wide[kBlock], v_wide[kBlock], m_wide[has_inner ? kBlock : 1];
  Real* const y = load_wide(t, t.y, t.y_lo, begin, n, y_block);
  const Real* const grad = load_wide(t, t.grad, kNoStream, begin, n, grad_block);
  Real* const z = gather(t, t.z, begin, n, z_wide);
  Real* const v = gather(t, t.exp_avg_sq, begin, n, v_wide);
  Real* const m = has_inner ? gather(t, t.exp_avg, begin, n, m_wide) : m_wide;
  const StepCoefs<Real> s(step);
  const AdamCoefs<Real> c(adam);
  Moves moves;
  with_storage(t, Real{}, [&](auto through) {
    switch (step.decay_at) {
      case DecayAt::kNowhere:
        adamw_loop<DecayAt::kNowhere, has_inner>(n, y, grad, z, v, m, moves, s, c, through);
        break;
      case DecayAt::kY:
        adamw_loop<DecayAt::kY, has_inner>(n, y, grad, z, v, m, moves, s, c, through);
        break;
      case DecayAt::kZ:
        adamw_loop<DecayAt::kZ, has_inner>(n, y, grad, z, v, m, moves, s, c, through);
        break;
    }
    settle_block(n, y, z, moves, s.settle, through);
  });
  store_wide(t, t.y, t.y_lo, begin, n, y, y_block);
  scatter(t, t.z, begin, n, z);
  scatter(t, t.exp_avg_sq, begin, n, v);
  if (has_inner) scatter(t, t.exp_avg, begin, n, m);
}

template <typename Real>
void swap_block(const TensorArgs& t, int64_t begin, int64_t n, const SwapScalars& swap) {
  Block<Real> y_block;
  alignas(64) Real z_wide[kBlock];
  Real* const p = load_wide(t, t.y, t.y_lo, begin, n, y_block);
  swap_loop<Real>(n, p, gather(t, t.z, begin, n, z_wide), swap);
  store_wide(t, t.y, t.y_lo, begin, n, p, y_block);
}

template <typename Real>
void polyak_block(const TensorArgs& t, int64_t begin, int64_t n, double* sums) {
  Block<Real> y_block, grad_block;
  alignas(64) Real z_wide[kBlock];
  alignas(64) double absolute[kLanes] = {}, inner[kLanes] = {};
  const Real* const y = load_wide(t, t.y, t.y_lo, begin, n, y_block);
  const Real* const grad = load_wide(t, t.grad, kNoStream, begin, n, grad_block);
  polyak_loop<Real>(n, y, grad, gather(t, t.z, begin, n, z_wide), absolute, inner);
  sums[0] = sum_lanes(absolute);
  sums[1] = sum_lanes(inner);
}

template <typename Real>
double squares_block(const TensorArgs& t, int64_t begin, int64_t n) {
  Block<Real> grad_block;
  alignas(64) double squares[kLanes] = {};
  squares_loop<Real>(n, load_wide(t, t.grad, kNoStream, begin, n, grad_block), squares);
  return sum_lanes(squares);
}

// ---- entry points ----------------------------------------------------------------------------------

void sgd_step_kernel(const TensorArgs& t, int64_t begin, int64_t n, const StepScalars& step) {
  if (t.y.dtype == DType::kFloat64) {
    sgd_block<double>(t, begin, n, step);
  } else {
    sgd_block<float>(t, begin, n, step);
  }
}

void adamw_step_kernel(const TensorArgs& t, int64_t begin, int64_t n, const StepScalars& step,
                       const AdamScalars& adam) {
  const bool has_inner = t.exp_avg.data != nullptr;
  if (t.y.dtype == DType::kFloat64) {
    has_inner ? adamw_block<true, double>(t, begin, n, step, adam)
              : adamw_block<false, double>(t, begin, n, step, adam);
  } else {
    has_inner ? adamw_block<true, float>(t, begin, n, step, adam)
              : adamw_block<false, float>(t, begin, n, step, adam);
  }
}

void swap_kernel(const TensorArgs& t, int64_t begin, int64_t n, const SwapScalars& swap) {
  if (t.y.dtype == DType::kFloat64) {
    swap_block<double>(t, begin, n, swap);
  } else {
    swap_block<float>(t, begin, n, swap);
  }
}

void polyak_sums_kernel(const TensorArgs& t, int64_t begin, int64_t n, double* sums) {
  if (t.y.dtype == DType::kFloat64) {
    polyak_block<double>(t, begin, n, sums);
  } else {
    polyak_block<float>(t, begin, n, sums);
  }
}

double sum_squares_kernel(const TensorArgs& t, int64_t begin, int64_t n) {
  return t.grad.dtype == DType::kFloat64 ? squares_block<double>(t, begin, n)
                                         : squares_block<float>(t, begin, n);
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table = {&sgd_step_kernel, &adamw_step_kernel, &swap_kernel, &polyak_sums_kernel,
                                    &sum_squares_kernel};
  return table;
}

}  // namespace SCHEDULEFREE_ISA
}  // namespace schedulefree
