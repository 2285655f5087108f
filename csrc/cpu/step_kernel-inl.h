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

using std::int16_t;
using std::int32_t;
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

// One block of a stream, in each of its guises.
template <typename Real>
struct Block {
  alignas(64) Real wide[kBlock];
  alignas(64) uint16_t word[kBlock];
  alignas(64) int16_t low[kBlock];

  // Room for the low halves of a format.
  template <typename Low>
  Low* lows() {
    return reinterpret_cast<Low*>(low);
  }
};

// A value as a type; std::integral_constant would be an instantiation of the standard library.
template <typename T, T value_>
struct Constant {
  static constexpr T value = value_;
};

// Loops of their own, for whose arrays the compiler knows that none overlaps another.
template <typename Format>
void widen_loop(int64_t n, const uint16_t* __restrict words, const typename Format::Low* __restrict lows,
                float* __restrict wide) {
  using Low = typename Format::Low;
  for (int64_t i = 0; i < n; ++i) wide[i] = Format::widen(words[i], Format::kHasLow ? lows[i] : Low{});
}

template <typename Format>
void narrow_loop(int64_t n, const float* __restrict wide, uint16_t* __restrict words,
                 typename Format::Low* __restrict lows) {
  for (int64_t i = 0; i < n; ++i) Format::narrow(wide[i], words[i], lows[i]);
}

// Calls `call(format)` for a stream that holds other than Real.
template <typename Call>
void with_split(const Stream& s, const Stream& lo, const Call& call) {
  if (s.dtype == DType::kFloat16) {
    lo.data ? call(SplitFp16{}) : call(Fp16{});
  } else if (!lo.data) {
    call(Bf16{});
  } else {
    lo.dtype == DType::kInt8 ? call(Split24{}) : call(SplitBf16{});
  }
}

// Calls `call(format)` with the format of a parameter, or with one by which it is rounded in the same way.
template <typename Call>
void with_parameter(const TensorArgs& t, float, const Call& call) {
  if (t.y_lo.data && t.y.dtype == DType::kFloat16) {
    call(SplitFp16{});
  } else if (t.y_lo.data && t.y_lo.dtype == DType::kInt8) {
    call(Split24{});
  } else {
    call(Float32{});  // as SplitBf16 rounds; and 16 bits alone, before they are stored
  }
}

template <typename Call>
void with_parameter(const TensorArgs&, double, const Call& call) {
  call(Float64{});
}

inline float* load_wide(const TensorArgs& t, const Stream& s, const Stream& lo, int64_t begin, int64_t n,
                        Block<float>& block) {
  if (s.dtype == DType::kFloat32) return gather(t, s, begin, n, block.wide);
  const uint16_t* const words = gather(t, s, begin, n, block.word);
  float* const wide = block.wide;
  with_split(s, lo, [&](auto format) {
    using Format = decltype(format);
    using Low = typename Format::Low;
    const Low* lows = nullptr;
    if constexpr (Format::kHasLow) lows = gather(t, lo, begin, n, block.template lows<Low>());
    widen_loop<Format>(n, words, lows, wide);
  });
  return wide;
}

inline double* load_wide(const TensorArgs& t, const Stream& s, const Stream&, int64_t begin, int64_t n,
                         Block<double>& block) {
  return gather(t, s, begin, n, block.wide);
}

inline void store_wide(const TensorArgs& t, const Stream& s, const Stream& lo, int64_t begin, int64_t n,
                       const float* wide, Block<float>& block) {
  if (s.dtype == DType::kFloat32) return scatter(t, s, begin, n, wide);
  uint16_t* const words = s.strides ? block.word : static_cast<uint16_t*>(s.data) + begin;
  with_split(s, lo, [&](auto format) {
    using Format = decltype(format);
    using Low = typename Format::Low;
    if constexpr (!Format::kHasLow) {
      Low none = 0;
      for (int64_t i = 0; i < n; ++i) Format::narrow(wide[i], words[i], none);
    } else {
      Low* const lows = lo.strides ? block.template lows<Low>() : static_cast<Low*>(lo.data) + begin;
      narrow_loop<Format>(n, wide, words, lows);
      scatter(t, lo, begin, n, lows);
    }
  });
  scatter(t, s, begin, n, words);
}

inline void store_wide(const TensorArgs& t, const Stream& s, const Stream&, int64_t begin, int64_t n,
                       const double* wide, Block<double>&) {
  scatter(t, s, begin, n, wide);
}

// A second moment of 8 bits (Moment8), or one that is kept as it is.
struct MomentBlock {
  alignas(64) uint8_t codes[kBlock];
};
static_assert(kBlock % Moment8::kBlock == 0, "a block of work has whole blocks of the second moment");

template <typename Real>
Real* load_moment(const TensorArgs& t, int64_t begin, int64_t n, Real* wide, MomentBlock& block) {
  if constexpr (sizeof(Real) == 4) {
    if (t.exp_avg_sq_scale.data) {
      const uint8_t* const codes = gather(t, t.exp_avg_sq, begin, n, block.codes);
      const float* const scales =
          static_cast<const float*>(t.exp_avg_sq_scale.data) + begin / Moment8::kBlock;
      for (int64_t first = 0; first < n; first += Moment8::kBlock) {
        const int64_t end = first + Moment8::kBlock < n ? first + Moment8::kBlock : n;
        const float scale = scales[first / Moment8::kBlock];
        for (int64_t i = first; i < end; ++i) wide[i] = Moment8::decoded(codes[i], scale);
      }
      return wide;
    }
  }
  return gather(t, t.exp_avg_sq, begin, n, wide);
}

// Writes the codes of up to a block's elements that share a scale; returns the scale. They are counted in 32
// bits, as their random numbers are.
inline float encode_loop(int64_t begin, int32_t n, const float* __restrict v, uint8_t* __restrict codes,
                         uint32_t key) {
  uint32_t largest = 0;
  for (int32_t i = 0; i < n; ++i) {
    const uint32_t each = Moment8::order(v[i]);
    largest = each > largest ? each : largest;
  }
  const float scale = Moment8::scale(largest);
  const float inverse = scale > 0 ? 1 / scale : 0;
  for (int32_t i = 0; i < n; ++i)
    codes[i] = Moment8::encoded(v[i], inverse, random_bits(key, begin, static_cast<uint32_t>(i)) >> 16);
  return scale;
}

template <typename Real>
void store_moment(const TensorArgs& t, int64_t begin, int64_t n, const Real* wide, MomentBlock& block,
                  uint32_t random) {
  if constexpr (sizeof(Real) == 4) {
    if (t.exp_avg_sq_scale.data) {
      uint8_t* const codes =
          t.exp_avg_sq.strides ? block.codes : static_cast<uint8_t*>(t.exp_avg_sq.data) + begin;
      float* const scales = static_cast<float*>(t.exp_avg_sq_scale.data) + begin / Moment8::kBlock;
      for (int64_t first = 0; first < n; first += Moment8::kBlock) {
        const int64_t end = first + Moment8::kBlock < n ? first + Moment8::kBlock : n;
        scales[first / Moment8::kBlock] = encode_loop(begin + first, static_cast<int32_t>(end - first),
                                                      wide + first, codes + first, random);
      }
      return scatter(t, t.exp_avg_sq, begin, n, codes);
    }
  }
  scatter(t, t.exp_avg_sq, begin, n, wide);
}

constexpr Stream kNoStream{};

// ---- loops -----------------------------------------------------------------------------------------

// Updates elements, and tells of each in `moves` what may_move() says of it. They are counted in 32 bits, as
// their random numbers are.
template <typename Y, bool at_random, DecayAt decay_at, typename Real>
void sgd_loop(int64_t begin, int32_t n, Real* __restrict y, const Real* __restrict grad, Real* __restrict z,
              uint8_t* __restrict moves, const StepCoefs<Real> s, uint32_t key) {
  for (int32_t i = 0; i < n; ++i) {
    sgd_update(y[i], grad[i], z[i], decay_at, s);
    const uint32_t random = at_random ? random_bits(key, begin, static_cast<uint32_t>(i)) : 0;
    round_update<Y, at_random>(y[i], z[i], random);
    moves[i] = may_move(y[i], z[i], s.settle);
  }
}

template <typename Y, bool at_random, DecayAt decay_at, bool has_inner, typename Real>
void adamw_loop(int64_t begin, int32_t n, Real* __restrict y, const Real* __restrict grad, Real* __restrict z,
                Real* __restrict v, Real* __restrict m, uint8_t* __restrict moves, const StepCoefs<Real> s,
                const AdamCoefs<Real> adam, uint32_t key) {
  Real unused = 0;
  for (int32_t i = 0; i < n; ++i) {
    adamw_update<has_inner>(y[i], grad[i], z[i], v[i], has_inner ? m[i] : unused, decay_at, s, adam);
    const uint32_t random = at_random ? random_bits(key, begin, static_cast<uint32_t>(i)) : 0;
    round_update<Y, at_random>(y[i], z[i], random);
    moves[i] = may_move(y[i], z[i], s.settle);
  }
}

// Elements that are settled together.
constexpr int64_t kSettled = 16;
static_assert(kBlock % kSettled == 0, "a block's worth of elements is settled in whole groups");

// Bit for bit what settle() makes of each; y is rounded.
template <typename Y, typename Real>
void settle_loop(int64_t n, Real* __restrict y, const Real* __restrict z, const SettleCoefs& s) {
  int64_t i = 0;
  for (; i + kSettled <= n; i += kSettled) {
    uint32_t again = 0;
    for (int64_t j = i; j < i + kSettled; ++j) y[j] = round_trip<Y>(y[j], z[j], s, again);
    if (!again) continue;
    for (int64_t j = i; j < i + kSettled; ++j) y[j] = round_trip<Y>(y[j], z[j], s, again);
  }
  for (; i < n; ++i) y[i] = settle<Y>(y[i], z[i], s);
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
template <typename Y>
void settle_block(int64_t n, float* __restrict y, const float* __restrict z, Moves& moves,
                  const SettleCoefs& s) {
  if (always_moves(s)) return settle_loop<Y>(n, y, z, s);
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
  settle_loop<Y>(count, y_moved, z_moved, s);
  for (int64_t i = 0; i < count; ++i) y[at[i]] = y_moved[i];
}

template <typename Y>
void settle_block(int64_t n, double* y, const double* z, Moves&, const SettleCoefs& s) {
  settle_loop<Y>(n, y, z, s);
}

template <typename Y, typename Real>
void swap_loop(int64_t n, Real* __restrict p, const Real* __restrict z, const SwapScalars swap) {
  for (int64_t i = 0; i < n; ++i) p[i] = Y::rounded(swapped(p[i], z[i], swap));
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

// Calls `call(format, at_random, decay_at)`, the last two as types, for a step of a parameter.
template <typename Real, typename Call>
void with_step(const TensorArgs& t, const StepScalars& step, const Call& call) {
  with_parameter(t, Real{}, [&](auto format) {
    const auto with_decay = [&](auto at_random) {
      switch (step.decay_at) {
        case DecayAt::kNowhere:
          return call(format, at_random, Constant<DecayAt, DecayAt::kNowhere>{});
        case DecayAt::kY:
          return call(format, at_random, Constant<DecayAt, DecayAt::kY>{});
        case DecayAt::kZ:
          return call(format, at_random, Constant<DecayAt, DecayAt::kZ>{});
      }
    };
    if constexpr (decltype(format)::kStochastic) {
      if (step.stochastic) return with_decay(Constant<bool, true>{});
    }
    with_decay(Constant<bool, false>{});
  });
}

template <typename Real>
void sgd_block(const TensorArgs& t, int64_t begin, int64_t n, const StepScalars& step) {
  Block<Real> y_block, grad_block, z_block;
  Real* const y = load_wide(t, t.y, t.y_lo, begin, n, y_block);
  const Real* const grad = load_wide(t, t.grad, kNoStream, begin, n, grad_block);
  Real* const z = load_wide(t, t.z, t.z_lo, begin, n, z_block);
  const StepCoefs<Real> s(step);
  Moves moves;
  with_step<Real>(t, step, [&](auto format, auto at_random, auto decay_at) {
    using Y = decltype(format);
    sgd_loop<Y, at_random.value, decay_at.value>(begin, static_cast<int32_t>(n), y, grad, z, moves, s,
                                                 step.random);
    settle_block<Y>(n, y, z, moves, s.settle);
  });
  store_wide(t, t.y, t.y_lo, begin, n, y, y_block);
  store_wide(t, t.z, t.z_lo, begin, n, z, z_block);
}

template <bool has_inner, typename Real>
void adamw_block(const TensorArgs& t, int64_t begin, int64_t n, const StepScalars& step,
                 const AdamScalars& adam) {
  Block<Real> y_block, grad_block, z_block;
  MomentBlock v_block;
  alignas(64) Real v_wide[kBlock], m_wide[has_inner ? kBlock : 1];
  Real* const y = load_wide(t, t.y, t.y_lo, begin, n, y_block);
  const Real* const grad = load_wide(t, t.grad, kNoStream, begin, n, grad_block);
  Real* const z = load_wide(t, t.z, t.z_lo, begin, n, z_block);
  Real* const v = load_moment(t, begin, n, v_wide, v_block);
  Real* const m = has_inner ? gather(t, t.exp_avg, begin, n, m_wide) : m_wide;
  const StepCoefs<Real> s(step);
  const AdamCoefs<Real> c(adam);
  Moves moves;
  with_step<Real>(t, step, [&](auto format, auto at_random, auto decay_at) {
    using Y = decltype(format);
    adamw_loop<Y, at_random.value, decay_at.value, has_inner>(begin, static_cast<int32_t>(n), y, grad, z, v,
                                                              m, moves, s, c, step.random);
    settle_block<Y>(n, y, z, moves, s.settle);
  });
  store_wide(t, t.y, t.y_lo, begin, n, y, y_block);
  store_wide(t, t.z, t.z_lo, begin, n, z, z_block);
  store_moment(t, begin, n, v, v_block, step.random);
  if (has_inner) scatter(t, t.exp_avg, begin, n, m);
}

template <typename Real>
void swap_block(const TensorArgs& t, int64_t begin, int64_t n, const SwapScalars& swap) {
  Block<Real> y_block, z_block;
  Real* const p = load_wide(t, t.y, t.y_lo, begin, n, y_block);
  const Real* const z = load_wide(t, t.z, t.z_lo, begin, n, z_block);
  with_parameter(t, Real{}, [&](auto format) { swap_loop<decltype(format), Real>(n, p, z, swap); });
  store_wide(t, t.y, t.y_lo, begin, n, p, y_block);
}

template <typename Real>
void polyak_block(const TensorArgs& t, int64_t begin, int64_t n, double* sums) {
  Block<Real> y_block, grad_block, z_block;
  alignas(64) double absolute[kLanes] = {}, inner[kLanes] = {};
  const Real* const y = load_wide(t, t.y, t.y_lo, begin, n, y_block);
  const Real* const grad = load_wide(t, t.grad, kNoStream, begin, n, grad_block);
  polyak_loop<Real>(n, y, grad, load_wide(t, t.z, t.z_lo, begin, n, z_block), absolute, inner);
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

// Calls `call(begin, n)` for the pieces of a block. One whose streams are converted is taken in small ones:
// each pass over a stream is then so short that the next stream's memory arrives meanwhile.
template <typename Call>
void for_each_piece(const TensorArgs& t, int64_t begin, int64_t n, const Call& call) {
  constexpr int64_t kPiece = 256;
  static_assert(kPiece % Moment8::kBlock == 0, "a piece has whole blocks of the second moment");
  const bool converts = t.y.dtype != DType::kFloat32 || t.exp_avg_sq_scale.data;
  if (!converts) return call(begin, n);
  for (int64_t at = 0; at < n; at += kPiece) call(begin + at, kPiece < n - at ? kPiece : n - at);
}

// ---- entry points ----------------------------------------------------------------------------------

void sgd_step_kernel(const TensorArgs& t, int64_t begin, int64_t n, const StepScalars& step) {
  if (t.y.dtype == DType::kFloat64) {
    sgd_block<double>(t, begin, n, step);
  } else {
    for_each_piece(t, begin, n, [&](int64_t at, int64_t size) { sgd_block<float>(t, at, size, step); });
  }
}

void adamw_step_kernel(const TensorArgs& t, int64_t begin, int64_t n, const StepScalars& step,
                       const AdamScalars& adam) {
  const bool has_inner = t.exp_avg.data != nullptr;
  if (t.y.dtype == DType::kFloat64) {
    has_inner ? adamw_block<true, double>(t, begin, n, step, adam)
              : adamw_block<false, double>(t, begin, n, step, adam);
  } else {
    for_each_piece(t, begin, n, [&](int64_t at, int64_t size) {
      has_inner ? adamw_block<true, float>(t, at, size, step, adam)
                : adamw_block<false, float>(t, at, size, step, adam);
    });
  }
}

void swap_kernel(const TensorArgs& t, int64_t begin, int64_t n, const SwapScalars& swap) {
  if (t.y.dtype == DType::kFloat64) {
    swap_block<double>(t, begin, n, swap);
  } else {
    for_each_piece(t, begin, n, [&](int64_t at, int64_t size) { swap_block<float>(t, at, size, swap); });
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
