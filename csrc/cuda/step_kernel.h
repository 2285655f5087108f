// What one thread of a CUDA kernel does: loads, the arithmetic of update_math.h, stores.
//
// Compiled for host and device alike, so that tests run a kernel's every thread without a GPU. A kernel's
// name and its launch are in launch.cuh.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/multi_tensor.h"
#include "step_args.h"
#include "update_math.h"

namespace schedulefree {

// ---- memory ----------------------------------------------------------------------------------------

template <typename T, int width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Vector {
  T at[width];
};

// Elements [i, i + width) of a stream of a piece.
template <int width, typename T, typename Piece, typename Index>
SCHEDULEFREE_INLINE void load(const Piece& piece, int stream, Index i, Vector<T, width>& values) {
  const T* const from = piece.template at<const T>(stream, i);
  if (width == 1 || piece.aligned(stream)) {
    values = *reinterpret_cast<const Vector<T, width>*>(from);
  } else {
    for (int e = 0; e < width; ++e) values.at[e] = from[e];
  }
}

template <int width, typename T, typename Piece, typename Index>
SCHEDULEFREE_INLINE void store(const Piece& piece, int stream, Index i, const Vector<T, width>& values) {
  T* const to = piece.template at<T>(stream, i);
  if (width == 1 || piece.aligned(stream)) {
    *reinterpret_cast<Vector<T, width>*>(to) = values;
  } else {
    for (int e = 0; e < width; ++e) to[e] = values.at[e];
  }
}

// ---- storage of parameters and gradients -----------------------------------------------------------

// As the arithmetic has it.
template <typename Real_>
struct Whole {
  using Real = Real_;
  using Word = Real_;
  static constexpr bool kHasLow = false;
  SCHEDULEFREE_INLINE Real widen(Word word, std::int16_t, bool) { return word; }
  SCHEDULEFREE_INLINE void narrow(Real x, Word& word, std::int16_t&, bool) { word = x; }
};

struct Float32 : Whole<float> {};
struct Float64 : Whole<double> {};

// bfloat16 or float16: which is known when the kernel runs.
struct Half {
  using Real = float;
  using Word = std::uint16_t;
  static constexpr bool kHasLow = false;
  SCHEDULEFREE_INLINE Real widen(Word word, std::int16_t, bool fp16) {
    return fp16 ? fp16_to_float(word) : bf16_to_float(word);
  }
  SCHEDULEFREE_INLINE void narrow(Real x, Word& word, std::int16_t&, bool fp16) {
    word = fp16 ? float_to_fp16(x) : float_to_bf16(x);
  }
};

// bfloat16 with its low half: a float32.
struct SplitFloat {
  using Real = float;
  using Word = std::uint16_t;
  static constexpr bool kHasLow = true;
  SCHEDULEFREE_INLINE Real widen(Word word, std::int16_t low, bool) { return join_float(word, low); }
  SCHEDULEFREE_INLINE void narrow(Real x, Word& word, std::int16_t& low, bool) { split_float(x, word, low); }
};

// A parameter's elements as they lie in memory.
template <typename Y, int width>
struct Parameter {
  Vector<typename Y::Word, width> word;
  Vector<std::int16_t, Y::kHasLow ? width : 1> low;

  template <typename Piece, typename Index>
  SCHEDULEFREE_MEMBER void load(const Piece& piece, int stream, int low_stream, Index i) {
    schedulefree::load<width>(piece, stream, i, word);
    if constexpr (Y::kHasLow) schedulefree::load<width>(piece, low_stream, i, low);
  }

  template <typename Piece, typename Index>
  SCHEDULEFREE_MEMBER void store(const Piece& piece, int stream, int low_stream, Index i) const {
    schedulefree::store<width>(piece, stream, i, word);
    if constexpr (Y::kHasLow) schedulefree::store<width>(piece, low_stream, i, low);
  }

  SCHEDULEFREE_MEMBER typename Y::Real wide(int e, bool fp16) const {
    return Y::widen(word.at[e], low.at[Y::kHasLow ? e : 0], fp16);
  }

  SCHEDULEFREE_MEMBER void set(int e, typename Y::Real x, bool fp16) {
    Y::narrow(x, word.at[e], low.at[Y::kHasLow ? e : 0], fp16);
  }
};

// A wide value as it comes back from a parameter's memory.
template <typename Y>
struct Through : std::conditional_t<std::is_same_v<Y, Half>, Through16Bits, AsItIs> {
  bool fp16;

  SCHEDULEFREE_MEMBER explicit Through(bool fp16) : fp16(fp16) {}

  SCHEDULEFREE_MEMBER typename Y::Real operator()(typename Y::Real wide) const {
    if constexpr (std::is_same_v<Y, Half>) return fp16 ? ThroughFp16{}(wide) : ThroughBf16{}(wide);
    return wide;
  }
};

// ---- what a kernel does to an element --------------------------------------------------------------
//
// A kernel is written for any `Op`, a struct that provides:
//
//   Real                  the type of its arithmetic
//   Args                  its scalars, as a kernel takes them
//   kStreams              how many streams it reads or writes
//   streams(t, streams)   on the host: those streams of a tensor, in the Op's order
//   element_sizes(sizes)  the sizes of their elements in bytes, in the same order
//
// and either, to update in place what the streams hold,
//
//   Values<width>                               `width` elements of each stream
//   load_values<width>(piece, i, values)        reads the elements from i on
//   finish<width>(piece, i, values, args)       computes and writes them
//
// or, to sum,
//
//   Total                                       one thread's sum, with add()
//   add<width>(piece, i, total, args)           adds the elements from i on
//
// A piece (multi_tensor.h) is the part of a tensor that a block works on.

// The scalars of a step in the precision of its arithmetic.
template <typename Real>
struct StepArgs {
  StepCoefs<Real> step;
  AdamCoefs<Real> adam;
  DecayAt decay_at;
  bool y_fp16, grad_fp16;

  StepArgs() = default;
  SCHEDULEFREE_MEMBER StepArgs(const StepScalars& step, const AdamScalars& adam, bool y_fp16, bool grad_fp16)
      : step(step), adam(adam), decay_at(step.decay_at), y_fp16(y_fp16), grad_fp16(grad_fp16) {}
};

// Where the scalars of a step come from.
struct StepSource {
  StepCoefficients coefs;
  const double* device_coefs = nullptr;  // on the device: StepCoefficients in place of `coefs`; or null
  DecayAt decay_at = DecayAt::kY;
  bool y_fp16 = false, grad_fp16 = false;
};

// The scalars that a kernel goes by. Returns false where the step is skipped.
template <typename Real>
SCHEDULEFREE_INLINE bool resolve(const StepSource& source, StepArgs<Real>& args) {
  const StepCoefficients coefs =
      source.device_coefs != nullptr ? step_coefficients(source.device_coefs) : source.coefs;
  if (coefs.take == 0) return false;
  args = StepArgs<Real>(step_scalars(coefs, source.decay_at), adam_scalars(coefs), source.y_fp16,
                        source.grad_fp16);
  return true;
}

// Settles what a step made of y. Branches divide a warp, but spare most of them the float64 arithmetic; the
// elements of a vector are settled side by side, since settling again changes nothing.
template <typename Y, int width, typename Real>
SCHEDULEFREE_INLINE void settle_parameter(Parameter<Y, width>& parameter, const Vector<Real, width>& z,
                                          const StepArgs<Real>& args) {
  const Through<Y> through(args.y_fp16);
  const SettleCoefs& coefs = args.step.settle;
  std::uint32_t again = always_moves(coefs, through);
  SCHEDULEFREE_UNROLL
  for (int e = 0; e < width; ++e) again |= may_move(parameter.wide(e, args.y_fp16), z.at[e], coefs, through);
  if (again == 0) return;
  Vector<Real, width> y;
  SCHEDULEFREE_UNROLL
  for (int e = 0; e < width; ++e) y.at[e] = through(parameter.wide(e, args.y_fp16));
  SCHEDULEFREE_NO_UNROLL
  for (int trip = 0; trip < 2 && again; ++trip) {
    again = 0;
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < width; ++e) y.at[e] = round_trip(y.at[e], z.at[e], coefs, through, again);
  }
  SCHEDULEFREE_UNROLL
  for (int e = 0; e < width; ++e) parameter.set(e, y.at[e], args.y_fp16);
}

template <typename Y, typename Grad>
struct SgdStep {
  using Real = typename Y::Real;
  using Args = StepArgs<Real>;
  enum Streams : int { kY, kGrad, kZ, kLow };
  static constexpr int kStreams = Y::kHasLow ? 4 : 3;

  static void streams(const TensorArgs& t, const Stream* (&streams)[kStreams]) {
    streams[kY] = &t.y;
    streams[kGrad] = &t.grad;
    streams[kZ] = &t.z;
    if constexpr (Y::kHasLow) streams[kLow] = &t.y_lo;
  }

  SCHEDULEFREE_INLINE void element_sizes(int (&sizes)[kStreams]) {
    sizes[kY] = sizeof(typename Y::Word);
    sizes[kGrad] = sizeof(typename Grad::Word);
    sizes[kZ] = sizeof(Real);
    if constexpr (Y::kHasLow) sizes[kLow] = sizeof(std::int16_t);
  }

  template <int width>
  struct Values {
    Parameter<Y, width> y;
    Parameter<Grad, width> grad;
    Vector<Real, width> z;
  };

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void load_values(const Piece& piece, std::int32_t i, Values<width>& values) {
    values.y.load(piece, kY, kLow, i);
    values.grad.load(piece, kGrad, kGrad, i);
    load<width>(piece, kZ, i, values.z);
  }

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void finish(const Piece& piece, std::int32_t i, Values<width>& values,
                                  const Args& args) {
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < width; ++e) {
      Real y = values.y.wide(e, args.y_fp16);
      sgd_update(y, values.grad.wide(e, args.grad_fp16), values.z.at[e], args.decay_at, args.step);
      values.y.set(e, y, args.y_fp16);
    }
    store<width>(piece, kZ, i, values.z);
    settle_parameter(values.y, values.z, args);
    values.y.store(piece, kY, kLow, i);
  }
};

template <typename Y, typename Grad, bool has_inner>
struct AdamwStep {
  using Real = typename Y::Real;
  using Args = StepArgs<Real>;
  enum Streams : int { kY, kGrad, kZ, kV, kM, kLow = has_inner ? 5 : 4 };
  static constexpr int kStreams = 4 + has_inner + Y::kHasLow;

  static void streams(const TensorArgs& t, const Stream* (&streams)[kStreams]) {
    streams[kY] = &t.y;
    streams[kGrad] = &t.grad;
    streams[kZ] = &t.z;
    streams[kV] = &t.exp_avg_sq;
    if constexpr (has_inner) streams[kM] = &t.exp_avg;
    if constexpr (Y::kHasLow) streams[kLow] = &t.y_lo;
  }

  SCHEDULEFREE_INLINE void element_sizes(int (&sizes)[kStreams]) {
    sizes[kY] = sizeof(typename Y::Word);
    sizes[kGrad] = sizeof(typename Grad::Word);
    sizes[kZ] = sizeof(Real);
    sizes[kV] = sizeof(Real);
    if constexpr (has_inner) sizes[kM] = sizeof(Real);
    if constexpr (Y::kHasLow) sizes[kLow] = sizeof(std::int16_t);
  }

  template <int width>
  struct Values {
    Parameter<Y, width> y;
    Parameter<Grad, width> grad;
    Vector<Real, width> z, v;
    Vector<Real, has_inner ? width : 1> m;
  };

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void load_values(const Piece& piece, std::int32_t i, Values<width>& values) {
    values.y.load(piece, kY, kLow, i);
    values.grad.load(piece, kGrad, kGrad, i);
    load<width>(piece, kZ, i, values.z);
    load<width>(piece, kV, i, values.v);
    if constexpr (has_inner) load<width>(piece, kM, i, values.m);
  }

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void finish(const Piece& piece, std::int32_t i, Values<width>& values,
                                  const Args& args) {
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < width; ++e) {
      Real y = values.y.wide(e, args.y_fp16);
      adamw_update<has_inner>(y, values.grad.wide(e, args.grad_fp16), values.z.at[e], values.v.at[e],
                              values.m.at[has_inner ? e : 0], args.decay_at, args.step, args.adam);
      values.y.set(e, y, args.y_fp16);
    }
    store<width>(piece, kZ, i, values.z);
    store<width>(piece, kV, i, values.v);
    if constexpr (has_inner) store<width>(piece, kM, i, values.m);
    settle_parameter(values.y, values.z, args);
    values.y.store(piece, kY, kLow, i);
  }
};

struct SwapArgs {
  SwapScalars swap;
  bool y_fp16;
};

template <typename Y>
struct Swap {
  using Real = typename Y::Real;
  using Args = SwapArgs;
  enum Streams : int { kY, kZ, kLow };
  static constexpr int kStreams = Y::kHasLow ? 3 : 2;

  static void streams(const TensorArgs& t, const Stream* (&streams)[kStreams]) {
    streams[kY] = &t.y;
    streams[kZ] = &t.z;
    if constexpr (Y::kHasLow) streams[kLow] = &t.y_lo;
  }

  SCHEDULEFREE_INLINE void element_sizes(int (&sizes)[kStreams]) {
    sizes[kY] = sizeof(typename Y::Word);
    sizes[kZ] = sizeof(Real);
    if constexpr (Y::kHasLow) sizes[kLow] = sizeof(std::int16_t);
  }

  template <int width>
  struct Values {
    Parameter<Y, width> y;
    Vector<Real, width> z;
  };

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void load_values(const Piece& piece, std::int32_t i, Values<width>& values) {
    values.y.load(piece, kY, kLow, i);
    load<width>(piece, kZ, i, values.z);
  }

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void finish(const Piece& piece, std::int32_t i, Values<width>& values,
                                  const Args& args) {
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < width; ++e)
      values.y.set(e, swapped(values.y.wide(e, args.y_fp16), values.z.at[e], args.swap), args.y_fp16);
    values.y.store(piece, kY, kLow, i);
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
  bool y_fp16 = false, grad_fp16 = false;
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
  SCHEDULEFREE_INLINE void add(const Piece& piece, std::int32_t i, Total& total, const Args& args) {
    Parameter<Grad, width> grad;
    grad.load(piece, kGrad, kGrad, i);
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < width; ++e) {
      const double g = static_cast<double>(grad.wide(e, args.grad_fp16));
      total.at[0] += g * g;
    }
  }
};

template <typename Y, typename Grad>
struct PolyakSums {
  using Real = typename Y::Real;
  using Args = SumArgs;
  using Total = Sums<2>;
  enum Streams : int { kY, kGrad, kZ, kLow };
  static constexpr int kStreams = Y::kHasLow ? 4 : 3;

  static void streams(const TensorArgs& t, const Stream* (&streams)[kStreams]) {
    SgdStep<Y, Grad>::streams(t, streams);
  }

  SCHEDULEFREE_INLINE void element_sizes(int (&sizes)[kStreams]) { SgdStep<Y, Grad>::element_sizes(sizes); }

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void add(const Piece& piece, std::int32_t i, Total& total, const Args& args) {
    Parameter<Y, width> y;
    Parameter<Grad, width> grad;
    Vector<Real, width> z;
    y.load(piece, kY, kLow, i);
    grad.load(piece, kGrad, kGrad, i);
    load<width>(piece, kZ, i, z);
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < width; ++e) {
      const double g = static_cast<double>(grad.wide(e, args.grad_fp16));
      total.at[0] += g < 0 ? -g : g;
      total.at[1] += g * (static_cast<double>(z.at[e]) - static_cast<double>(y.wide(e, args.y_fp16)));
    }
  }
};

// ---- a thread's share of a block -------------------------------------------------------------------

// The element before or behind the vectors of a piece that a thread takes, if any.
template <typename Piece>
SCHEDULEFREE_INLINE bool loose_element(const Piece& piece, std::int32_t thread, std::int32_t& i) {
  constexpr int kWidth = Piece::kWidth;
  if (kWidth == 1) return false;
  const std::int32_t behind = piece.size - piece.size % kWidth + thread - kWidth;
  i = thread < piece.head ? thread - piece.head : behind;
  return thread < piece.head || (thread >= kWidth && behind < piece.size);
}

// Updates a thread's vector of a piece and a loose element. `scalars` gives the address of an Op's Args, or
// null where nothing is to be updated; it is called once the loads are under way.
template <typename Op, typename Piece, typename Scalars>
SCHEDULEFREE_INLINE void update_piece(const Piece& piece, std::int32_t thread, const Scalars& scalars) {
  constexpr int kWidth = Piece::kWidth;
  const std::int32_t i = thread * kWidth;
  const bool whole = i + kWidth <= piece.size;
  typename Op::template Values<kWidth> values;
  if (whole) Op::template load_values<kWidth>(piece, i, values);
  const typename Op::Args* const args = scalars();
  if (args == nullptr) return;
  if (whole) Op::template finish<kWidth>(piece, i, values, *args);
  std::int32_t loose = 0;
  if (loose_element(piece, thread, loose)) {
    typename Op::template Values<1> value;
    Op::template load_values<1>(piece, loose, value);
    Op::template finish<1>(piece, loose, value, *args);
  }
}

// What a thread has to add to the sums of a piece.
template <typename Op, typename Piece>
SCHEDULEFREE_INLINE typename Op::Total sum_piece(const typename Op::Args& args, const Piece& piece,
                                                 std::int32_t thread) {
  constexpr int kWidth = Piece::kWidth;
  const std::int32_t vectors = piece.size / kWidth;
  typename Op::Total total = {};
  for (std::int32_t i = thread; i < vectors; i += kThreads)
    Op::template add<kWidth>(piece, i * kWidth, total, args);
  std::int32_t i = 0;
  if (loose_element(piece, thread, i)) Op::template add<1>(piece, i, total, args);
  return total;
}

}  // namespace schedulefree
