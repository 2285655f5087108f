// What one thread of a CUDA kernel does: loads, the arithmetic of update_math.h, stores.
//
// Compiled for host and device alike, so that tests run a kernel's every thread without a GPU. A kernel's
// name and its launch are in launch.cuh.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/multi_tensor.h"
#include "step_args.h"
#include "storage.h"
#include "update_math.h"

namespace schedulefree {

// ---- memory ----------------------------------------------------------------------------------------

template <typename T, int width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Vector {
  T at[width];
};

// `width` elements of a stream of a piece, from i on. Where fewer are `left`, which may be none and less than
// none, zeros follow.
//
// `left` is only compared: ptxas 13.0 branches the wrong way on a number that was clamped to [0, width].
template <int width, typename T, typename Piece>
SCHEDULEFREE_INLINE void load(const Piece& piece, int stream, std::int32_t i, std::int32_t left,
                              Vector<T, width>& values) {
  if (left >= width && piece.aligned(stream)) {
    values = *piece.template at<const Vector<T, width>, T>(stream, i);
    return;
  }
  SCHEDULEFREE_UNROLL
  for (int e = 0; e < width; ++e)
    values.at[e] = e < left ? *piece.template at<const T, T>(stream, i + e) : T{};
}

template <int width, typename T, typename Piece>
SCHEDULEFREE_INLINE void store(const Piece& piece, int stream, std::int32_t i, std::int32_t left,
                               const Vector<T, width>& values) {
  if (left >= width && piece.aligned(stream)) {
    *piece.template at<Vector<T, width>, T>(stream, i) = values;
    return;
  }
  SCHEDULEFREE_UNROLL
  for (int e = 0; e < width; ++e) {
    if (e < left) *piece.template at<T, T>(stream, i + e) = values.at[e];
  }
}

// A gradient of bfloat16 or float16: which is known when the kernel runs.
struct Half {
  using Word = std::uint16_t;
  using Low = std::int16_t;
  static constexpr bool kHasLow = false;
};

// Elements of one format (storage.h) as they lie in memory.
template <typename Format, int width>
struct Elements {
  Vector<typename Format::Word, width> word;
  Vector<typename Format::Low, Format::kHasLow ? width : 1> low;

  template <typename Piece>
  SCHEDULEFREE_MEMBER void load(const Piece& piece, int stream, int low_stream, std::int32_t i,
                                std::int32_t left) {
    schedulefree::load<width>(piece, stream, i, left, word);
    if constexpr (Format::kHasLow) schedulefree::load<width>(piece, low_stream, i, left, low);
  }

  template <typename Piece>
  SCHEDULEFREE_MEMBER void store(const Piece& piece, int stream, int low_stream, std::int32_t i,
                                 std::int32_t left) const {
    schedulefree::store<width>(piece, stream, i, left, word);
    if constexpr (Format::kHasLow) schedulefree::store<width>(piece, low_stream, i, left, low);
  }

  SCHEDULEFREE_MEMBER auto wide(int e, bool fp16 = false) const {
    if constexpr (std::is_same_v<Format, Half>) {
      return fp16 ? fp16_to_float(word.at[e]) : bf16_to_float(word.at[e]);
    } else {
      return Format::widen(word.at[e], low.at[Format::kHasLow ? e : 0]);
    }
  }

  template <typename Real>
  SCHEDULEFREE_MEMBER void set(int e, Real x) {
    Format::narrow(x, word.at[e], low.at[Format::kHasLow ? e : 0]);
  }
};

// ---- what a kernel does to its elements ------------------------------------------------------------
//
// A kernel is written for any `Op`, a struct that provides:
//
//   Args                  its scalars, as a kernel takes them
//   kStreams              how many streams it reads or writes
//   streams(t, streams)   on the host: those streams of a tensor, in the Op's order
//   element_sizes(sizes)  the sizes of their elements in bytes, in the same order; kWholeTensor for a stream
//                         that is not cut into pieces
//
// and either, to update in place what the streams hold,
//
//   Values<width>                          `width` elements of each stream
//   load(piece, i, left, values)           reads elements from i on, of which `left` are there
//   update(values, element, args)          computes; `element` counts through the tensor. Returns what
//                                          store() needs the largest of, over Moment8::kBlock elements
//   store(piece, i, left, values, element, largest, args)
//   kShares                                whether it does need that
//
// or, to sum,
//
//   Total                                  one thread's sum, with add()
//   add<width>(piece, i, left, total, args)  adds elements from i on, of which `left` are there
//
// A piece (multi_tensor.h) is the part of a tensor that a block works on.

// The scalars of a step in the precision of its arithmetic.
template <typename Real>
struct StepArgs {
  StepCoefs<Real> step;
  AdamCoefs<Real> adam;
  std::uint32_t random;
  DecayAt decay_at;
  bool stochastic, grad_fp16;

  StepArgs() = default;
  SCHEDULEFREE_MEMBER StepArgs(const StepScalars& step, const AdamScalars& adam, bool grad_fp16)
      : step(step),
        adam(adam),
        random(step.random),
        decay_at(step.decay_at),
        stochastic(step.stochastic),
        grad_fp16(grad_fp16) {}
};

// Where the scalars of a step come from.
struct StepSource {
  StepCoefficients coefs;
  const double* device_coefs = nullptr;  // on the device: StepCoefficients in place of `coefs`; or null
  DecayAt decay_at = DecayAt::kY;
  bool grad_fp16 = false;
};

// The scalars that a kernel goes by. Returns false where the step is skipped.
template <typename Real>
SCHEDULEFREE_INLINE bool resolve(const StepSource& source, StepArgs<Real>& args) {
  const StepCoefficients coefs =
      source.device_coefs != nullptr ? step_coefficients(source.device_coefs) : source.coefs;
  if (coefs.take == 0) return false;
  args = StepArgs<Real>(step_scalars(coefs, source.decay_at), adam_scalars(coefs), source.grad_fp16);
  return true;
}

SCHEDULEFREE_INLINE std::uint32_t larger(std::uint32_t a, std::uint32_t b) { return a > b ? a : b; }

// Rounds and settles what a step made of some elements, and puts it where it is stored from. Branches divide
// a warp, but spare most of them the float64 arithmetic.
template <typename Y, int width, typename Real>
SCHEDULEFREE_INLINE void finish(Elements<Y, width>& y_stored, Elements<typename Y::State, width>& z_stored,
                                Vector<Real, width>& y, Vector<Real, width>& z, std::int64_t element,
                                const StepArgs<Real>& args) {
  const SettleCoefs& coefs = args.step.settle;
  std::uint32_t moves = always_moves(coefs);
  SCHEDULEFREE_UNROLL
  for (int e = 0; e < width; ++e) {
    if constexpr (Y::kStochastic) {
      if (args.stochastic) round_update<Y, true>(y.at[e], z.at[e], random_bits(args.random, element + e));
    }
    round_update<Y, false>(y.at[e], z.at[e], 0);
    z_stored.set(e, z.at[e]);
    moves |= may_move(y.at[e], z.at[e], coefs);
  }
  if (moves != 0) settle<Y, width>(y.at, z.at, coefs);
  SCHEDULEFREE_UNROLL
  for (int e = 0; e < width; ++e) y_stored.set(e, y.at[e]);
}

// Streams that have low halves stand behind those that all formats have.
template <typename Y, typename Grad>
struct SgdStep {
  using Real = typename Y::Real;
  using Z = typename Y::State;
  using Args = StepArgs<Real>;
  enum Streams : int { kY, kGrad, kZ, kYLow, kZLow };
  static constexpr int kStreams = 3 + Y::kHasLow + Z::kHasLow;
  static constexpr bool kShares = false;

  static void streams(const TensorArgs& t, const Stream* (&streams)[kStreams]) {
    streams[kY] = &t.y;
    streams[kGrad] = &t.grad;
    streams[kZ] = &t.z;
    if constexpr (Y::kHasLow) streams[kYLow] = &t.y_lo;
    if constexpr (Z::kHasLow) streams[kZLow] = &t.z_lo;
  }

  SCHEDULEFREE_INLINE void element_sizes(int (&sizes)[kStreams]) {
    sizes[kY] = sizeof(typename Y::Word);
    sizes[kGrad] = sizeof(typename Grad::Word);
    sizes[kZ] = sizeof(typename Z::Word);
    if constexpr (Y::kHasLow) sizes[kYLow] = sizeof(typename Y::Low);
    if constexpr (Z::kHasLow) sizes[kZLow] = sizeof(typename Z::Low);
  }

  template <int width>
  struct Values {
    Elements<Y, width> y;
    Elements<Grad, width> grad;
    Elements<Z, width> z;
  };

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void load(const Piece& piece, std::int32_t i, std::int32_t left,
                                Values<width>& values) {
    values.y.load(piece, kY, kYLow, i, left);
    values.grad.load(piece, kGrad, kGrad, i, left);
    values.z.load(piece, kZ, kZLow, i, left);
  }

  template <int width>
  SCHEDULEFREE_INLINE std::uint32_t update(Values<width>& values, std::int64_t element, const Args& args) {
    Vector<Real, width> y, z;
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < width; ++e) {
      y.at[e] = values.y.wide(e);
      z.at[e] = values.z.wide(e);
      sgd_update(y.at[e], values.grad.wide(e, args.grad_fp16), z.at[e], args.decay_at, args.step);
    }
    finish(values.y, values.z, y, z, element, args);
    return 0;
  }

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void store(const Piece& piece, std::int32_t i, std::int32_t left,
                                 const Values<width>& values, std::int64_t, std::uint32_t, const Args&) {
    values.z.store(piece, kZ, kZLow, i, left);
    values.y.store(piece, kY, kYLow, i, left);
  }
};

template <typename Y, typename Grad, typename V, bool has_inner>
struct AdamwStep {
  using Real = typename Y::Real;
  using Z = typename Y::State;
  using Args = StepArgs<Real>;
  static constexpr bool kShares = V::kShares;
  enum Streams : int { kY, kGrad, kZ, kV, kM, kScale = kM + has_inner, kYLow = kScale + kShares, kZLow };
  static constexpr int kStreams = 4 + has_inner + kShares + Y::kHasLow + Z::kHasLow;

  static void streams(const TensorArgs& t, const Stream* (&streams)[kStreams]) {
    streams[kY] = &t.y;
    streams[kGrad] = &t.grad;
    streams[kZ] = &t.z;
    streams[kV] = &t.exp_avg_sq;
    if constexpr (has_inner) streams[kM] = &t.exp_avg;
    if constexpr (kShares) streams[kScale] = &t.exp_avg_sq_scale;
    if constexpr (Y::kHasLow) streams[kYLow] = &t.y_lo;
    if constexpr (Z::kHasLow) streams[kZLow] = &t.z_lo;
  }

  SCHEDULEFREE_INLINE void element_sizes(int (&sizes)[kStreams]) {
    sizes[kY] = sizeof(typename Y::Word);
    sizes[kGrad] = sizeof(typename Grad::Word);
    sizes[kZ] = sizeof(typename Z::Word);
    sizes[kV] = sizeof(typename V::Word);
    if constexpr (has_inner) sizes[kM] = sizeof(Real);
    if constexpr (kShares) sizes[kScale] = kWholeTensor;
    if constexpr (Y::kHasLow) sizes[kYLow] = sizeof(typename Y::Low);
    if constexpr (Z::kHasLow) sizes[kZLow] = sizeof(typename Z::Low);
  }

  template <int width>
  struct Values {
    Elements<Y, width> y;
    Elements<Grad, width> grad;
    Elements<Z, width> z;
    Vector<typename V::Word, width> v;
    Vector<Real, has_inner ? width : 1> m;
    float scale;                                  // of v
    Vector<Real, kShares ? width : 1> v_updated;  // not stored yet
  };

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void load(const Piece& piece, std::int32_t i, std::int32_t left,
                                Values<width>& values) {
    values.y.load(piece, kY, kYLow, i, left);
    values.grad.load(piece, kGrad, kGrad, i, left);
    values.z.load(piece, kZ, kZLow, i, left);
    schedulefree::load<width>(piece, kV, i, left, values.v);
    if constexpr (has_inner) schedulefree::load<width>(piece, kM, i, left, values.m);
    // Elements that are not there have code 0 and no gradient: none becomes the largest of its block.
    if constexpr (kShares) values.scale = left > 0 ? *scale_of(piece, i) : 0;
  }

  template <int width>
  SCHEDULEFREE_INLINE std::uint32_t update(Values<width>& values, std::int64_t element, const Args& args) {
    Vector<Real, width> y, z;
    std::uint32_t largest = 0;
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < width; ++e) {
      y.at[e] = values.y.wide(e);
      z.at[e] = values.z.wide(e);
      Real v;
      if constexpr (kShares) {
        v = Moment8::decoded(values.v.at[e], values.scale);
      } else {
        v = values.v.at[e];
      }
      adamw_update<has_inner>(y.at[e], values.grad.wide(e, args.grad_fp16), z.at[e], v,
                              values.m.at[has_inner ? e : 0], args.decay_at, args.step, args.adam);
      if constexpr (kShares) {
        values.v_updated.at[e] = v;
        largest = larger(largest, Moment8::order(v));
      } else {
        values.v.at[e] = v;
      }
    }
    finish(values.y, values.z, y, z, element, args);
    return largest;
  }

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void store(const Piece& piece, std::int32_t i, std::int32_t left, Values<width>& values,
                                 std::int64_t element, std::uint32_t largest, const Args& args) {
    if constexpr (kShares) {
      const float scale = Moment8::scale(largest);
      SCHEDULEFREE_UNROLL
      for (int e = 0; e < width; ++e) {
        values.v.at[e] =
            Moment8::encoded(values.v_updated.at[e], scale, random_bits(args.random, element + e));
      }
      if (left > 0 && element % Moment8::kBlock == 0) *scale_of(piece, i) = scale;
    }
    values.z.store(piece, kZ, kZLow, i, left);
    schedulefree::store<width>(piece, kV, i, left, values.v);
    if constexpr (has_inner) schedulefree::store<width>(piece, kM, i, left, values.m);
    values.y.store(piece, kY, kYLow, i, left);
  }

 private:
  template <typename Piece>
  SCHEDULEFREE_INLINE float* scale_of(const Piece& piece, std::int32_t i) {
    return static_cast<float*>(piece.whole(kScale)) + (piece.begin + i) / Moment8::kBlock;
  }
};

template <typename Y>
struct Swap {
  using Real = typename Y::Real;
  using Z = typename Y::State;
  using Args = SwapScalars;
  enum Streams : int { kY, kZ, kYLow, kZLow };
  static constexpr int kStreams = 2 + Y::kHasLow + Z::kHasLow;
  static constexpr bool kShares = false;

  static void streams(const TensorArgs& t, const Stream* (&streams)[kStreams]) {
    streams[kY] = &t.y;
    streams[kZ] = &t.z;
    if constexpr (Y::kHasLow) streams[kYLow] = &t.y_lo;
    if constexpr (Z::kHasLow) streams[kZLow] = &t.z_lo;
  }

  SCHEDULEFREE_INLINE void element_sizes(int (&sizes)[kStreams]) {
    sizes[kY] = sizeof(typename Y::Word);
    sizes[kZ] = sizeof(typename Z::Word);
    if constexpr (Y::kHasLow) sizes[kYLow] = sizeof(typename Y::Low);
    if constexpr (Z::kHasLow) sizes[kZLow] = sizeof(typename Z::Low);
  }

  template <int width>
  struct Values {
    Elements<Y, width> y;
    Elements<Z, width> z;
  };

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void load(const Piece& piece, std::int32_t i, std::int32_t left,
                                Values<width>& values) {
    values.y.load(piece, kY, kYLow, i, left);
    values.z.load(piece, kZ, kZLow, i, left);
  }

  template <int width>
  SCHEDULEFREE_INLINE std::uint32_t update(Values<width>& values, std::int64_t, const Args& swap) {
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < width; ++e)
      values.y.set(e, Y::rounded(swapped(values.y.wide(e), values.z.wide(e), swap)));
    return 0;
  }

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void store(const Piece& piece, std::int32_t i, std::int32_t left,
                                 const Values<width>& values, std::int64_t, std::uint32_t, const Args&) {
    values.y.store(piece, kY, kYLow, i, left);
  }
};

template <int count>
struct Sums {
  double at[count];

  SCHEDULEFREE_MEMBER void add(const Sums& other) {
    for (int i = 0; i < count; ++i) at[i] += other.at[i];
  }
};

struct SumArgs {
  bool grad_fp16 = false;
};

template <typename Grad>
struct SumOfSquares {
  using Args = SumArgs;
  using Total = Sums<1>;
  enum Streams : int { kGrad };
  static constexpr int kStreams = 1;

  static void streams(const TensorArgs& t, const Stream* (&streams)[kStreams]) { streams[kGrad] = &t.grad; }

  SCHEDULEFREE_INLINE void element_sizes(int (&sizes)[kStreams]) {
    sizes[kGrad] = sizeof(typename Grad::Word);
  }

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void add(const Piece& piece, std::int32_t i, std::int32_t left, Total& total,
                               const Args& args) {
    Elements<Grad, width> grad;
    grad.load(piece, kGrad, kGrad, i, left);
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < width; ++e) {
      const double g = static_cast<double>(grad.wide(e, args.grad_fp16));
      total.at[0] += g * g;
    }
  }
};

template <typename Y, typename Grad>
struct PolyakSums : SgdStep<Y, Grad> {  // reads what a step of SGD does
  using Step = SgdStep<Y, Grad>;
  using Args = SumArgs;
  using Total = Sums<2>;

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void add(const Piece& piece, std::int32_t i, std::int32_t left, Total& total,
                               const Args& args) {
    typename Step::template Values<width> values;
    Step::template load<width>(piece, i, left, values);
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < width; ++e) {
      const double g = static_cast<double>(values.grad.wide(e, args.grad_fp16));
      total.at[0] += g < 0 ? -g : g;
      total.at[1] += g * (static_cast<double>(values.z.wide(e)) - static_cast<double>(values.y.wide(e)));
    }
  }
};

// ---- a thread's share of a block -------------------------------------------------------------------

// A thread's vector of a piece.
template <typename Op, int width>
struct Share {
  typename Op::template Values<width> values;
  std::int32_t i, left;  // the first element, and how many there are from it on in the piece

  template <typename Piece>
  SCHEDULEFREE_MEMBER void load(const Piece& piece, std::int32_t thread) {
    i = thread * width;
    left = piece.size - i;
    Op::template load<width>(piece, i, left, values);
  }

  // Returns what store() needs the largest of, over the threads of Moment8::kBlock elements.
  template <typename Piece>
  SCHEDULEFREE_MEMBER std::uint32_t update(const Piece& piece, const typename Op::Args& args) {
    return Op::template update<width>(values, piece.begin + i, args);
  }

  template <typename Piece>
  SCHEDULEFREE_MEMBER void store(const Piece& piece, std::uint32_t largest, const typename Op::Args& args) {
    Op::template store<width>(piece, i, left, values, piece.begin + i, largest, args);
  }
};

// What a thread has to add to the sums of a piece.
template <typename Op, typename Piece>
SCHEDULEFREE_INLINE typename Op::Total sum_piece(const typename Op::Args& args, const Piece& piece,
                                                 std::int32_t thread) {
  typename Op::Total total = {};
  for (std::int32_t i = thread * kVector; i < piece.size; i += kThreads * kVector)
    Op::template add<kVector>(piece, i, piece.size - i, total, args);
  return total;
}

}  // namespace schedulefree
