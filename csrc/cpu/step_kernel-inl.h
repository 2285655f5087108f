// The CPU kernels, compiled once per instruction set: the including file defines SCHEDULEFREE_ISA.
//
// No include guard: each inclusion is a namespace of its own. Nothing here may instantiate a template of
// the standard library: its code would be shared between units, and a unit for AVX-512 could lend it to
// the baseline.
#include "cpu/isa_dispatch.h"
#include "step_args.h"
#include "storage.h"
#include "update_math.h"

#ifndef SCHEDULEFREE_ISA
#error "define SCHEDULEFREE_ISA before including step_kernel-inl.h"
#endif

namespace schedulefree {
namespace SCHEDULEFREE_ISA {
namespace {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

// ---- streams ---------------------------------------------------------------------------------------
//
// The loops run on dense elements, in whatever format they lie in memory (storage.h). A stream with gaps is
// brought into a block-sized array that stays in the first-level cache, and written back.

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

// A value as a type; std::integral_constant would be an instantiation of the standard library.
template <typename T, T value_>
struct Constant {
  static constexpr T value = value_;
};

// A block of elements of one format, dense.
template <typename Format>
struct Elements {
  typename Format::Word* word;
  typename Format::Low* low;
  alignas(64) typename Format::Word word_scratch[kBlock];
  alignas(64) typename Format::Low low_scratch[Format::kHasLow ? kBlock : 1];

  Elements(const TensorArgs& t, const Stream& s, const Stream& lo, int64_t begin, int64_t n)
      : word(gather(t, s, begin, n, word_scratch)), low(low_scratch) {
    if constexpr (Format::kHasLow) {
      low = gather(t, lo, begin, n, low_scratch);
    } else {
      low_scratch[0] = 0;  // passed on, though unused
    }
  }
  void write_back(const TensorArgs& t, const Stream& s, const Stream& lo, int64_t begin, int64_t n) const {
    scatter(t, s, begin, n, word);
    if constexpr (Format::kHasLow) scatter(t, lo, begin, n, low);
  }
  typename Format::Real wide(int64_t i) const { return Format::widen(word[i], low[Format::kHasLow ? i : 0]); }
  void set(int64_t i, typename Format::Real x) { Format::narrow(x, word[i], low[Format::kHasLow ? i : 0]); }
};

// Calls `call(format)` with the format of a parameter. Those of 16 bits alone are swapped, but not stepped.
template <typename Call>
void with_parameter(const TensorArgs& t, const Call& call) {
  if (t.y.dtype == DType::kFloat32) {
    call(Float32{});
  } else if (t.y.dtype == DType::kFloat64) {
    call(Float64{});
  } else if (t.y.dtype == DType::kFloat16) {
    t.y_lo.data ? call(SplitFp16{}) : call(Fp16{});
  } else if (!t.y_lo.data) {
    call(Bf16{});
  } else {
    t.y_lo.dtype == DType::kInt8 ? call(Split24{}) : call(SplitBf16{});
  }
}

// A gradient as the arithmetic has it: in place, or in `wide`. The loop is one of its own, for whose arrays
// the compiler knows that none overlaps another.
template <typename Format>
void widen_loop(int64_t n, const uint16_t* __restrict words, float* __restrict wide) {
  for (int64_t i = 0; i < n; ++i) wide[i] = Format::widen(words[i], 0);
}

template <typename Real>
const Real* load_gradient(const TensorArgs& t, int64_t begin, int64_t n, Real* wide) {
  if constexpr (sizeof(Real) == 4) {
    if (t.grad.dtype != DType::kFloat32) {
      alignas(64) uint16_t scratch[kBlock];
      const uint16_t* const words = gather(t, t.grad, begin, n, scratch);
      t.grad.dtype == DType::kFloat16 ? widen_loop<Fp16>(n, words, wide) : widen_loop<Bf16>(n, words, wide);
      return wide;
    }
  }
  return gather(t, t.grad, begin, n, wide);
}

// ---- loops -----------------------------------------------------------------------------------------
//
// Arrays are arguments, for the compiler to know that none overlaps another. Elements are counted in 32 bits,
// as their random numbers are.

// Rounds and stores what a step has made of an element, and tells what may_move() says of it.
template <typename Y, bool at_random>
SCHEDULEFREE_INLINE uint8_t finish(typename Y::Real y, typename Y::Real z, typename Y::Word& y_word,
                                   typename Y::Low& y_low, typename Y::State::Word& z_word,
                                   typename Y::State::Low& z_low, uint32_t random, const SettleScalars& s) {
  round_update<Y, at_random>(y, z, random);
  Y::narrow(y, y_word, y_low);
  Y::State::narrow(z, z_word, z_low);
  return may_move(y, z, s);
}

template <typename Y, bool at_random, DecayAt decay_at, typename Real = typename Y::Real>
void sgd_loop(int32_t n, typename Y::Word* __restrict y_word, typename Y::Low* __restrict y_low,
              const Real* __restrict grad, typename Y::State::Word* __restrict z_word,
              typename Y::State::Low* __restrict z_low, uint8_t* __restrict moves, const StepScalars<Real> s,
              int64_t begin) {
  using Z = typename Y::State;
  for (int32_t i = 0; i < n; ++i) {
    Real y = Y::widen(y_word[i], y_low[Y::kHasLow ? i : 0]),
         z = Z::widen(z_word[i], z_low[Z::kHasLow ? i : 0]);
    sgd_update(y, grad[i], z, decay_at, s);
    const uint32_t random = at_random ? random_bits(s.random, begin, static_cast<uint32_t>(i)) : 0;
    moves[i] = finish<Y, at_random>(y, z, y_word[i], y_low[Y::kHasLow ? i : 0], z_word[i],
                                    z_low[Z::kHasLow ? i : 0], random, s.settle);
  }
}

// Returns the largest of the second moments as Moment8 orders them. Where that is how they are stored, they
// go to `v_wide` first.
template <typename Y, typename V, bool has_inner, bool at_random, DecayAt decay_at,
          typename Real = typename Y::Real>
uint32_t adamw_loop(int32_t n, typename Y::Word* __restrict y_word, typename Y::Low* __restrict y_low,
                    const Real* __restrict grad, typename Y::State::Word* __restrict z_word,
                    typename Y::State::Low* __restrict z_low, typename V::Word* __restrict v_word,
                    float scale, Real* __restrict v_wide, Real* __restrict m, uint8_t* __restrict moves,
                    const StepScalars<Real> s, int64_t begin) {
  using Z = typename Y::State;
  Real no_mean = 0;
  uint32_t largest = 0;
  for (int32_t i = 0; i < n; ++i) {
    Real y = Y::widen(y_word[i], y_low[Y::kHasLow ? i : 0]),
         z = Z::widen(z_word[i], z_low[Z::kHasLow ? i : 0]);
    Real& mean = has_inner ? m[i] : no_mean;
    if constexpr (!V::kShares) {
      adamw_update<has_inner>(y, grad[i], z, v_word[i], mean, decay_at, s);
    } else {
      Real v = V::decoded(v_word[i], scale);
      adamw_update<has_inner>(y, grad[i], z, v, mean, decay_at, s);
      const uint32_t order = V::order(v);
      largest = order > largest ? order : largest;
      v_wide[i] = v;
    }
    const uint32_t random = at_random ? random_bits(s.random, begin, static_cast<uint32_t>(i)) : 0;
    moves[i] = finish<Y, at_random>(y, z, y_word[i], y_low[Y::kHasLow ? i : 0], z_word[i],
                                    z_low[Z::kHasLow ? i : 0], random, s.settle);
  }
  return largest;
}

inline void encode_loop(int32_t n, const float* __restrict v, uint8_t* __restrict codes, float scale,
                        int64_t begin, uint32_t key) {
  for (int32_t i = 0; i < n; ++i)
    codes[i] = Moment8::encoded(v[i], scale, random_bits(key, begin, static_cast<uint32_t>(i)));
}

// Elements that are settled together.
constexpr int64_t kSettled = 16;
static_assert(kBlock % kSettled == 0, "there is room for whole groups");

// Settles the elements at `count` places, which are whole groups.
template <typename Y>
void settle_at(int64_t count, const uint16_t* at, Elements<Y>& y, const Elements<typename Y::State>& z,
               const SettleScalars& s) {
  using Real = typename Y::Real;
  for (const uint16_t* const end = at + count; at < end; at += kSettled) {
    alignas(64) Real y_wide[kSettled], z_wide[kSettled];
    for (int64_t i = 0; i < kSettled; ++i) {
      y_wide[i] = y.wide(at[i]);
      z_wide[i] = z.wide(at[i]);
    }
    settle<Y, kSettled>(y_wide, z_wide, s);
    for (int64_t i = 0; i < kSettled; ++i) y.set(at[i], y_wide[i]);
  }
}

// What may_move() says of the elements of a block. Zeros follow, so that it is read in whole rows.
constexpr int64_t kRow = 16;
using Moves = uint8_t[kBlock + kRow];

// Writes the positions of the elements that may move to `at`; returns how many there are.
inline int64_t find_moves(int64_t n, Moves& moves, uint16_t* at) {
  memset(moves + n, 0, kRow * sizeof(moves[0]));
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
template <typename Y>
void settle_block(int64_t n, Elements<Y>& y, const Elements<typename Y::State>& z, Moves& moves,
                  const SettleScalars& s) {
  uint16_t at[kBlock + 1];  // find_moves() writes one place beyond those it counts
  int64_t count = 0;
  if (sizeof(typename Y::Real) == 8 || always_moves(s)) {
    for (; count < n; ++count) at[count] = static_cast<uint16_t>(count);
  } else {
    count = find_moves(n, moves, at);
  }
  for (; count % kSettled != 0; ++count) at[count] = at[0];
  settle_at(count, at, y, z, s);
}

template <typename Y, typename Real = typename Y::Real>
void swap_loop(int64_t n, typename Y::Word* __restrict word, typename Y::Low* __restrict low,
               const typename Y::State::Word* __restrict z_word,
               const typename Y::State::Low* __restrict z_low, const SwapWeight swap) {
  using Z = typename Y::State;
  for (int32_t i = 0; i < n; ++i) {
    const Real p = Y::widen(word[i], low[Y::kHasLow ? i : 0]),
               z = Z::widen(z_word[i], z_low[Z::kHasLow ? i : 0]);
    Y::narrow(Y::rounded(swapped(p, z, swap)), word[i], low[Y::kHasLow ? i : 0]);
  }
}

// With `exchange` the memory of y holds z, or is going to, and that of z x.
template <typename Y, bool exchange, typename Real = typename Y::Real>
void before_base_step_loop(int32_t n, typename Y::Word* __restrict y_word, typename Y::Low* __restrict y_low,
                           typename Y::State::Word* __restrict z_word, const SwapWeight to_x,
                           const StepScalars<Real> s) {
  for (int32_t i = 0; i < n; ++i) {
    Real y = Y::widen(y_word[i], y_low[Y::kHasLow ? i : 0]), z = z_word[i];
    before_base_step<Y>(y, z, to_x, s);
    Y::narrow(exchange ? z : y, y_word[i], y_low[Y::kHasLow ? i : 0]);
    z_word[i] = exchange ? y : z;
  }
}

template <typename Y, bool exchange, typename Real = typename Y::Real>
void after_base_step_loop(int32_t n, typename Y::Word* __restrict y_word, typename Y::Low* __restrict y_low,
                          typename Y::State::Word* __restrict z_word, uint8_t* __restrict moves,
                          const StepScalars<Real> s) {
  for (int32_t i = 0; i < n; ++i) {
    const Real first = Y::widen(y_word[i], y_low[Y::kHasLow ? i : 0]), second = z_word[i];
    Real y = exchange ? second : first;
    const Real z = exchange ? first : second;
    after_base_step<Y>(y, z, s);
    Y::narrow(y, y_word[i], y_low[Y::kHasLow ? i : 0]);
    z_word[i] = z;
    moves[i] = may_move(y, z, s.settle);
  }
}

// Sums kLanes interleaved partial sums, so that the order of additions, and with it every bit, is the same
// whatever the width of the vectors.
constexpr int64_t kLanes = 16;

template <typename Y, typename Real = typename Y::Real>
void polyak_loop(int64_t n, const Elements<Y>& y, const Real* __restrict grad,
                 const Elements<typename Y::State>& z, double* __restrict absolute,
                 double* __restrict inner) {
  const auto add = [&](int64_t i, int64_t lane) {
    const double g = static_cast<double>(grad[i]);
    absolute[lane] += g < 0 ? -g : g;
    inner[lane] += g * (static_cast<double>(z.wide(i)) - static_cast<double>(y.wide(i)));
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

// Calls `call(at_random, decay_at)`, both as types, for a step of a parameter of format Y.
template <typename Y, typename Call>
void with_options(const StepUpdate& step, const Call& call) {
  const auto with_decay = [&](auto at_random) {
    switch (step.decay_at) {
      case DecayAt::kNowhere:
        return call(at_random, Constant<DecayAt, DecayAt::kNowhere>{});
      case DecayAt::kY:
        return call(at_random, Constant<DecayAt, DecayAt::kY>{});
      case DecayAt::kZ:
        return call(at_random, Constant<DecayAt, DecayAt::kZ>{});
    }
  };
  if constexpr (Y::kStochastic) {
    if (step.single.stochastic != 0) return with_decay(Constant<bool, true>{});
  }
  with_decay(Constant<bool, false>{});
}

template <typename Real>
const StepScalars<Real>& scalars_of(const StepUpdate& step) {
  if constexpr (sizeof(Real) == 8) {
    return step.wide;
  } else {
    return step.single;
  }
}

template <typename Y, typename Real = typename Y::Real>
void sgd_block(const TensorArgs& t, int64_t begin, int64_t n, const StepUpdate& step) {
  using Z = typename Y::State;
  alignas(64) Real grad_scratch[kBlock];
  Elements<Y> y(t, t.y, t.y_lo, begin, n);
  const Real* const grad = load_gradient(t, begin, n, grad_scratch);
  Elements<Z> z(t, t.z, t.z_lo, begin, n);
  const StepScalars<Real>& s = scalars_of<Real>(step);
  Moves moves;
  with_options<Y>(step, [&](auto at_random, auto decay_at) {
    sgd_loop<Y, at_random.value, decay_at.value>(static_cast<int32_t>(n), y.word, y.low, grad, z.word, z.low,
                                                 moves, s, begin);
  });
  settle_block(n, y, z, moves, s.settle);
  y.write_back(t, t.y, t.y_lo, begin, n);
  z.write_back(t, t.z, t.z_lo, begin, n);
}

template <typename Y, typename V, bool has_inner, typename Real = typename Y::Real>
void adamw_block(const TensorArgs& t, int64_t begin, int64_t n, const StepUpdate& step) {
  using Z = typename Y::State;
  constexpr bool kShares = V::kShares;
  constexpr int64_t kPart = kShares ? Moment8::kBlock : kBlock;  // of which the loop finds the largest moment
  static_assert(kBlock % Moment8::kBlock == 0, "a block of work has whole blocks of the second moment");
  alignas(64) Real grad_scratch[kBlock], m_scratch[has_inner ? kBlock : 1];
  alignas(64) typename V::Word v_scratch[kBlock];
  alignas(64) Real v_wide[kShares ? kPart : 1];
  Elements<Y> y(t, t.y, t.y_lo, begin, n);
  const Real* const grad = load_gradient(t, begin, n, grad_scratch);
  Elements<Z> z(t, t.z, t.z_lo, begin, n);
  typename V::Word* const v = gather(t, t.exp_avg_sq, begin, n, v_scratch);
  float* const scales = static_cast<float*>(t.exp_avg_sq_scale.data) + (kShares ? begin / kPart : 0);
  Real* const m = has_inner ? gather(t, t.exp_avg, begin, n, m_scratch) : m_scratch;
  const StepScalars<Real>& s = scalars_of<Real>(step);
  Moves moves;
  with_options<Y>(step, [&](auto at_random, auto decay_at) {
    for (int64_t at = 0; at < n; at += kPart) {
      const auto size = static_cast<int32_t>(kPart < n - at ? kPart : n - at);
      const uint32_t largest = adamw_loop<Y, V, has_inner, at_random.value, decay_at.value>(
          size, y.word + at, y.low + (Y::kHasLow ? at : 0), grad + at, z.word + at,
          z.low + (Z::kHasLow ? at : 0), v + at, kShares ? scales[at / kPart] : 0, v_wide,
          m + (has_inner ? at : 0), moves + at, s, begin + at);
      if constexpr (kShares) {
        const float scale = scales[at / kPart] = V::scale(largest);
        encode_loop(size, v_wide, v + at, scale, begin + at, s.random);
      }
    }
  });
  settle_block(n, y, z, moves, s.settle);
  y.write_back(t, t.y, t.y_lo, begin, n);
  z.write_back(t, t.z, t.z_lo, begin, n);
  scatter(t, t.exp_avg_sq, begin, n, v);
  if (has_inner) scatter(t, t.exp_avg, begin, n, m);
}

// ---- entry points ----------------------------------------------------------------------------------

void sgd_step_kernel(const TensorArgs& t, int64_t begin, int64_t n, const StepUpdate& step) {
  with_parameter(t, [&](auto format) {
    using Y = decltype(format);
    if constexpr (Y::kSteps) sgd_block<Y>(t, begin, n, step);
  });
}

void adamw_step_kernel(const TensorArgs& t, int64_t begin, int64_t n, const StepUpdate& step) {
  with_parameter(t, [&](auto format) {
    using Y = decltype(format);
    const auto with_inner = [&](auto moment) {
      using V = decltype(moment);
      t.exp_avg.data ? adamw_block<Y, V, true>(t, begin, n, step)
                     : adamw_block<Y, V, false>(t, begin, n, step);
    };
    if constexpr (Y::kSteps) {
      if constexpr (sizeof(typename Y::Real) == 4) {
        if (t.exp_avg_sq_scale.data) return with_inner(Moment8{});
      }
      with_inner(WholeMoment<typename Y::Real>{});
    }
  });
}

void swap_kernel(const TensorArgs& t, int64_t begin, int64_t n, const SwapWeight& swap) {
  with_parameter(t, [&](auto format) {
    using Y = decltype(format);
    Elements<Y> p(t, t.y, t.y_lo, begin, n);
    const Elements<typename Y::State> z(t, t.z, t.z_lo, begin, n);
    swap_loop<Y>(n, p.word, p.low, z.word, z.low, swap);
    p.write_back(t, t.y, t.y_lo, begin, n);
  });
}

// Calls `loop(format, exchange, y, z, scalars)`, the first two as types, with a block of a parameter that a
// base optimizer steps: z has no low half, and y's memory is exchanged only where y has none.
template <typename Loop>
void base_step_block(const TensorArgs& t, int64_t begin, int64_t n, const BaseStepUpdate& update,
                     const Loop& loop) {
  with_parameter(t, [&](auto format) {
    using Y = decltype(format);
    using Z = typename Y::State;
    if constexpr (Y::kSteps && !Z::kHasLow) {
      Elements<Y> y(t, t.y, t.y_lo, begin, n);
      Elements<Z> z(t, t.z, t.z_lo, begin, n);
      const auto& s = scalars_of<typename Y::Real>(update.step);
      if constexpr (Y::kHasLow) {
        loop(format, Constant<bool, false>{}, y, z, s);
      } else {
        update.exchange ? loop(format, Constant<bool, true>{}, y, z, s)
                        : loop(format, Constant<bool, false>{}, y, z, s);
      }
      y.write_back(t, t.y, t.y_lo, begin, n);
      z.write_back(t, t.z, t.z_lo, begin, n);
    }
  });
}

void before_base_step_kernel(const TensorArgs& t, int64_t begin, int64_t n, const BaseStepUpdate& update) {
  base_step_block(t, begin, n, update, [&](auto format, auto exchange, auto& y, auto& z, const auto& s) {
    before_base_step_loop<decltype(format), exchange.value>(static_cast<int32_t>(n), y.word, y.low, z.word,
                                                            update.to_x, s);
  });
}

void after_base_step_kernel(const TensorArgs& t, int64_t begin, int64_t n, const BaseStepUpdate& update) {
  base_step_block(t, begin, n, update, [&](auto format, auto exchange, auto& y, auto& z, const auto& s) {
    Moves moves;
    after_base_step_loop<decltype(format), exchange.value>(static_cast<int32_t>(n), y.word, y.low, z.word,
                                                           moves, s);
    settle_block(n, y, z, moves, s.settle);
  });
}

void polyak_sums_kernel(const TensorArgs& t, int64_t begin, int64_t n, double* sums) {
  with_parameter(t, [&](auto format) {
    using Y = decltype(format);
    if constexpr (Y::kSteps) {
      alignas(64) typename Y::Real grad_scratch[kBlock];
      alignas(64) double absolute[kLanes] = {}, inner[kLanes] = {};
      const Elements<Y> y(t, t.y, t.y_lo, begin, n);
      const Elements<typename Y::State> z(t, t.z, t.z_lo, begin, n);
      polyak_loop<Y>(n, y, load_gradient(t, begin, n, grad_scratch), z, absolute, inner);
      sums[0] = sum_lanes(absolute);
      sums[1] = sum_lanes(inner);
    }
  });
}

template <typename Real>
double squares_block(const TensorArgs& t, int64_t begin, int64_t n) {
  alignas(64) Real grad_scratch[kBlock];
  alignas(64) double squares[kLanes] = {};
  squares_loop<Real>(n, load_gradient(t, begin, n, grad_scratch), squares);
  return sum_lanes(squares);
}

double sum_squares_kernel(const TensorArgs& t, int64_t begin, int64_t n) {
  return t.grad.dtype == DType::kFloat64 ? squares_block<double>(t, begin, n)
                                         : squares_block<float>(t, begin, n);
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable table = {&sgd_step_kernel,         &adamw_step_kernel,      &swap_kernel,
                                    &before_base_step_kernel, &after_base_step_kernel, &polyak_sums_kernel,
                                    &sum_squares_kernel};
  return table;
}

}  // namespace SCHEDULEFREE_ISA
}  // namespace schedulefree
