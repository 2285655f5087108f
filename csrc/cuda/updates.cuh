// What one thread of a kernel does: loads, the arithmetic of update_math.h, stores.
#pragma once

#include <cstdint>
#include <type_traits>

#include "coefficients.h"
#include "cuda/multi_tensor.h"
#include "storage.h"
#include "update_math.h"

namespace schedulefree {

// ---- memory ----------------------------------------------------------------------------------------

template <typename T, int width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Vector {
  T at[width];
};

// A vector of a stream of a piece, from i on. Where fewer than its elements are `left`, which may be none and
// less than none, zeros follow.
//
// `left` is only compared: ptxas 12.6 to 13.3 branches the wrong way on a number that was clamped to
// [0, width].
template <int width, typename T, typename Piece>
SCHEDULEFREE_INLINE void load(const Piece& piece, StreamId id, std::int32_t i, std::int32_t left,
                              Vector<T, width>& values) {
  if (left >= width && piece.aligned(id)) {
    values = *reinterpret_cast<const Vector<T, width>*>(piece.template at<const T>(id, i));
    return;
  }
  SCHEDULEFREE_UNROLL
  for (int e = 0; e < width; ++e) values.at[e] = e < left ? *piece.template at<const T>(id, i + e) : T{};
}

template <int width, typename T, typename Piece>
SCHEDULEFREE_INLINE void store(const Piece& piece, StreamId id, std::int32_t i, std::int32_t left,
                               const Vector<T, width>& values) {
  if (left >= width && piece.aligned(id)) {
    *reinterpret_cast<Vector<T, width>*>(piece.template at<T>(id, i)) = values;
    return;
  }
  SCHEDULEFREE_UNROLL
  for (int e = 0; e < width; ++e) {
    if (e < left) *piece.template at<T>(id, i + e) = values.at[e];
  }
}

// A vector of one format (storage.h) as it lies in memory.
template <typename Format>
struct Elements {
  Vector<typename Format::Word, kVector> word;
  Vector<typename Format::Low, Format::kHasLow ? kVector : 1> low;

  template <typename Piece>
  SCHEDULEFREE_MEMBER void load(const Piece& piece, StreamId id, StreamId low_id, std::int32_t i,
                                std::int32_t left) {
    schedulefree::load(piece, id, i, left, word);
    if constexpr (Format::kHasLow) schedulefree::load(piece, low_id, i, left, low);
  }

  template <typename Piece>
  SCHEDULEFREE_MEMBER void store(const Piece& piece, StreamId id, StreamId low_id, std::int32_t i,
                                 std::int32_t left) const {
    schedulefree::store(piece, id, i, left, word);
    if constexpr (Format::kHasLow) schedulefree::store(piece, low_id, i, left, low);
  }

  SCHEDULEFREE_MEMBER typename Format::Real wide(int e) const {
    return Format::widen(word.at[e], low.at[Format::kHasLow ? e : 0]);
  }
  SCHEDULEFREE_MEMBER void set(int e, typename Format::Real x) {
    Format::narrow(x, word.at[e], low.at[Format::kHasLow ? e : 0]);
  }
};

// ---- updates ---------------------------------------------------------------------------------------
//
// A kernel that updates is written for any `Op`, one thread's vector of each stream:
//
//   kStreams             the streams that it reads or writes
//   Source               where its scalars come from, as a kernel takes it; get() gives their address, or
//   null
//                        where nothing is to be updated
//   load(piece, i, left)             reads from element i on, of which `left` are there
//   update(element, scalars)         computes; `element` counts through the tensor. Returns what store()
//   needs
//                                    the largest of, over the threads of a warp
//   kShares                          whether it does need that
//   store(piece, i, left, element, largest, scalars)

SCHEDULEFREE_INLINE std::uint32_t larger(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

// The low halves of a parameter of format Y and of its z.
template <typename Y>
inline constexpr unsigned kLowStreams =
    (Y::kHasLow ? only(kYLow) : 0) | (Y::State::kHasLow ? only(kZLow) : 0);

// A step whose scalars the host knows: they are operands from the constant bank, and what they decide is
// compiled.
template <DecayAt where, bool random>
struct Known {
  template <typename Real>
  struct Source {
    StepScalars<Real> scalars;
    SCHEDULEFREE_MEMBER const StepScalars<Real>* get() const { return &scalars; }
  };
  template <typename Real>
  SCHEDULEFREE_INLINE constexpr DecayAt decay_at(const StepScalars<Real>&) {
    return where;
  }
  template <typename Real>
  SCHEDULEFREE_INLINE constexpr bool at_random(const StepScalars<Real>&) {
    return random;
  }
};

// What resolve_kernel makes of the scalars on the device.
template <typename Real>
struct ResolvedStep {
  StepScalars<Real> scalars;
  std::int64_t take;  // 0: the step is skipped
};

// A step whose scalars are on the device, so that a CUDA graph replays with those of the moment.
template <DecayAt where>
struct Captured {
  template <typename Real>
  struct Source {
    const ResolvedStep<Real>* step;
    SCHEDULEFREE_MEMBER const StepScalars<Real>* get() const {
      return step->take != 0 ? &step->scalars : nullptr;
    }
  };
  template <typename Real>
  SCHEDULEFREE_INLINE DecayAt decay_at(const StepScalars<Real>& scalars) {
    return scalars.weight_decay != 0 ? where : DecayAt::kNowhere;
  }
  template <typename Real>
  SCHEDULEFREE_INLINE bool at_random(const StepScalars<Real>& scalars) {
    return scalars.stochastic != 0;
  }
};

// Of SGD, which has no second moment.
struct NoMoment {
  using Word = std::uint8_t;
  static constexpr bool kShares = false;
};

// A step of a parameter of format Y, with gradients of format Grad and a second moment V.
template <typename Y, typename Grad, typename V, bool has_inner, typename Options>
struct Step {
  using Real = typename Y::Real;
  using Z = typename Y::State;
  using Source = typename Options::template Source<Real>;
  static constexpr bool kAdam = !std::is_same_v<V, NoMoment>;
  static constexpr bool kShares = V::kShares;
  static constexpr unsigned kStreams = only(kY) | only(kGrad) | only(kZ) | (kAdam ? only(kV) : 0) |
                                       (has_inner ? only(kM) : 0) | (kShares ? only(kScale) : 0) |
                                       kLowStreams<Y>;

  Elements<Y> y;
  Elements<Grad> grad;
  Elements<Z> z;
  Vector<typename V::Word, kAdam ? kVector : 1> v;
  Vector<Real, has_inner ? kVector : 1> m;
  float scale;                                    // of v
  Vector<Real, kShares ? kVector : 1> v_updated;  // not stored yet

  template <typename Piece>
  SCHEDULEFREE_MEMBER void load(const Piece& piece, std::int32_t i, std::int32_t left) {
    y.load(piece, kY, kYLow, i, left);
    grad.load(piece, kGrad, kGrad, i, left);
    z.load(piece, kZ, kZLow, i, left);
    if constexpr (kAdam) schedulefree::load(piece, kV, i, left, v);
    if constexpr (has_inner) schedulefree::load(piece, kM, i, left, m);
    // Elements that are not there have code 0 and no gradient: none becomes the largest of its block.
    if constexpr (kShares) scale = left > 0 ? *scale_of(piece, i) : 0;
  }

  SCHEDULEFREE_MEMBER std::uint32_t update(std::int64_t element, const StepScalars<Real>& s) {
    const DecayAt decay_at = Options::decay_at(s);
    Vector<Real, kVector> y_wide, z_wide;
    std::uint32_t largest = 0, moves = always_moves(s.settle);
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < kVector; ++e) {
      Real& y_new = y_wide.at[e] = y.wide(e);
      Real& z_new = z_wide.at[e] = z.wide(e);
      if constexpr (!kAdam) {
        sgd_update(y_new, grad.wide(e), z_new, decay_at, s);
      } else if constexpr (kShares) {
        Real moment = V::decoded(v.at[e], scale);
        adamw_update<has_inner>(y_new, grad.wide(e), z_new, moment, m.at[has_inner ? e : 0], decay_at, s);
        v_updated.at[e] = moment;
        largest = larger(largest, V::order(moment));
      } else {
        adamw_update<has_inner>(y_new, grad.wide(e), z_new, v.at[e], m.at[has_inner ? e : 0], decay_at, s);
      }
      if constexpr (Y::kStochastic) {
        if (Options::at_random(s)) round_update<Y, true>(y_new, z_new, random_bits(s.random, element + e));
      }
      round_update<Y, false>(y_new, z_new, 0);
      z.set(e, z_new);
      moves |= may_move(y_new, z_new, s.settle);
    }
    // Branches divide a warp, but spare most of them the float64 arithmetic.
    if (moves != 0) settle<Y, kVector>(y_wide.at, z_wide.at, s.settle);
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < kVector; ++e) y.set(e, y_wide.at[e]);
    return largest;
  }

  template <typename Piece>
  SCHEDULEFREE_MEMBER void store(const Piece& piece, std::int32_t i, std::int32_t left, std::int64_t element,
                                 std::uint32_t largest, const StepScalars<Real>& s) {
    if constexpr (kShares) {
      const float shared = V::scale(largest);
      SCHEDULEFREE_UNROLL
      for (int e = 0; e < kVector; ++e)
        v.at[e] = V::encoded(v_updated.at[e], shared, random_bits(s.random, element + e));
      if (left > 0 && element % V::kBlock == 0) *scale_of(piece, i) = shared;
    }
    z.store(piece, kZ, kZLow, i, left);
    if constexpr (kAdam) schedulefree::store(piece, kV, i, left, v);
    if constexpr (has_inner) schedulefree::store(piece, kM, i, left, m);
    y.store(piece, kY, kYLow, i, left);
  }

 private:
  template <typename Piece>
  SCHEDULEFREE_INLINE float* scale_of(const Piece& piece, std::int32_t i) {
    return piece.template whole<float>(kScale) + (piece.begin + i) / V::kBlock;
  }
};

// A swap between y and x.
template <typename Y>
struct Swap {
  using Z = typename Y::State;
  struct Source {
    SwapWeight weight;
    SCHEDULEFREE_MEMBER const SwapWeight* get() const { return &weight; }
  };
  static constexpr bool kShares = false;
  static constexpr unsigned kStreams = only(kY) | only(kZ) | kLowStreams<Y>;

  Elements<Y> y;
  Elements<Z> z;

  template <typename Piece>
  SCHEDULEFREE_MEMBER void load(const Piece& piece, std::int32_t i, std::int32_t left) {
    y.load(piece, kY, kYLow, i, left);
    z.load(piece, kZ, kZLow, i, left);
  }

  SCHEDULEFREE_MEMBER std::uint32_t update(std::int64_t, const SwapWeight& weight) {
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < kVector; ++e) y.set(e, Y::rounded(swapped(y.wide(e), z.wide(e), weight)));
    return 0;
  }

  template <typename Piece>
  SCHEDULEFREE_MEMBER void store(const Piece& piece, std::int32_t i, std::int32_t left, std::int64_t,
                                 std::uint32_t, const SwapWeight&) {
    y.store(piece, kY, kYLow, i, left);
  }
};

// Where what surrounds the step of a base optimizer finds its scalars.
template <typename StepSource>
struct BaseStepSource {
  StepSource step;
  SwapWeight to_x;  // before that step
  SCHEDULEFREE_MEMBER const BaseStepSource* get() const { return step.get() != nullptr ? this : nullptr; }
};

// What comes before the step of a base optimizer, or after it. With `exchange` the memory of y holds z
// during that step, and the memory of z holds x.
template <typename Y, bool before, bool exchange, typename Options>
struct BaseStep {
  using Real = typename Y::Real;
  using Z = typename Y::State;
  using Source = BaseStepSource<typename Options::template Source<Real>>;
  static constexpr bool kShares = false;
  static constexpr unsigned kStreams = only(kY) | only(kZ) | kLowStreams<Y>;

  Elements<Y> y;
  Elements<Z> z;

  template <typename Piece>
  SCHEDULEFREE_MEMBER void load(const Piece& piece, std::int32_t i, std::int32_t left) {
    y.load(piece, kY, kYLow, i, left);
    z.load(piece, kZ, kZLow, i, left);
  }

  SCHEDULEFREE_MEMBER std::uint32_t update(std::int64_t, const Source& source) {
    constexpr bool crossed_before = exchange && !before, crossed_after = exchange && before;
    const StepScalars<Real>& s = *source.step.get();
    Vector<Real, kVector> y_wide, z_wide;
    std::uint32_t moves = !before && always_moves(s.settle);
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < kVector; ++e) {
      Real& y_new = y_wide.at[e] = crossed_before ? z.wide(e) : y.wide(e);
      Real& z_new = z_wide.at[e] = crossed_before ? y.wide(e) : z.wide(e);
      if constexpr (before) {
        before_base_step<Y>(y_new, z_new, source.to_x, s);
      } else {
        after_base_step<Y>(y_new, z_new, s);
        moves |= may_move(y_new, z_new, s.settle);
      }
    }
    if (moves != 0) settle<Y, kVector>(y_wide.at, z_wide.at, s.settle);
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < kVector; ++e) {
      y.set(e, crossed_after ? z_wide.at[e] : y_wide.at[e]);
      z.set(e, crossed_after ? y_wide.at[e] : z_wide.at[e]);
    }
    return 0;
  }

  template <typename Piece>
  SCHEDULEFREE_MEMBER void store(const Piece& piece, std::int32_t i, std::int32_t left, std::int64_t,
                                 std::uint32_t, const Source&) {
    y.store(piece, kY, kYLow, i, left);
    z.store(piece, kZ, kZLow, i, left);
  }
};

// ---- sums ------------------------------------------------------------------------------------------
//
// A kernel that sums is written for any `Op` with kStreams and
//
//   kSums                            how many sums
//   add(piece, i, left, totals)      adds elements from i on, of which `left` are there

template <int count>
struct Totals {
  double at[count];

  SCHEDULEFREE_MEMBER void add(const Totals& other) {
    for (int i = 0; i < count; ++i) at[i] += other.at[i];
  }
};

template <typename Grad>
struct SumOfSquares {
  static constexpr unsigned kStreams = only(kGrad);
  static constexpr int kSums = 1;

  template <typename Piece>
  SCHEDULEFREE_INLINE void add(const Piece& piece, std::int32_t i, std::int32_t left, Totals<1>& totals) {
    Elements<Grad> grad;
    grad.load(piece, kGrad, kGrad, i, left);
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < kVector; ++e) {
      const double g = static_cast<double>(grad.wide(e));
      totals.at[0] += g * g;
    }
  }
};

// The sum of |g|, and that of g * (z - y).
template <typename Y, typename Grad>
struct PolyakSums {
  static constexpr unsigned kStreams = only(kY) | only(kGrad) | only(kZ) | kLowStreams<Y>;
  static constexpr int kSums = 2;

  template <typename Piece>
  SCHEDULEFREE_INLINE void add(const Piece& piece, std::int32_t i, std::int32_t left, Totals<2>& totals) {
    Elements<Y> y;
    Elements<Grad> grad;
    Elements<typename Y::State> z;
    y.load(piece, kY, kYLow, i, left);
    grad.load(piece, kGrad, kGrad, i, left);
    z.load(piece, kZ, kZLow, i, left);
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < kVector; ++e) {
      const double g = static_cast<double>(grad.wide(e));
      totals.at[0] += g < 0 ? -g : g;
      totals.at[1] += g * (static_cast<double>(z.wide(e)) - static_cast<double>(y.wide(e)));
    }
  }
};

}  // namespace schedulefree
