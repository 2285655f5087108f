// What one thread of a CUDA kernel does: loads, the arithmetic of update_math.h, stores.
//
// Compiled for host and device alike, so that tests run a kernel's every thread without a GPU. A kernel's
// name and its launch are in launch.cuh.
#pragma once

#include <cstdint>

#include "cuda/multi_tensor.h"
#include "step_args.h"
#include "update_math.h"

// Loops over the elements of a vector must leave nothing indexed; loops over vectors have as many of them in
// flight as is said, and no more.
#if defined(__CUDA_ARCH__)
#define SCHEDULEFREE_UNROLL _Pragma("unroll")
#define SCHEDULEFREE_NO_UNROLL _Pragma("unroll 1")
#else
#define SCHEDULEFREE_UNROLL
#define SCHEDULEFREE_NO_UNROLL
#endif

namespace schedulefree {

// ---- memory ----------------------------------------------------------------------------------------

template <typename T, int width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Vector {
  T at[width];
};

// Whether somebody reads an element again soon: parameters are read by the next forward pass.
enum class Reuse { kSoon, kNever };

#if defined(__CUDA_ARCH__)
template <std::size_t bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = unsigned long long;
};
template <>
struct WordOf<16> {
  using type = uint4;
};
#endif

template <Reuse reuse, typename V>
SCHEDULEFREE_INLINE V load_once(const V* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (reuse == Reuse::kNever) {
    constexpr std::size_t kBytes = sizeof(V) < 16 ? sizeof(V) : 16;
    using Word = typename WordOf<kBytes>::type;
    V value;
    SCHEDULEFREE_UNROLL
    for (std::size_t i = 0; i < sizeof(V) / kBytes; ++i)
      reinterpret_cast<Word*>(&value)[i] = __ldcs(reinterpret_cast<const Word*>(from) + i);
    return value;
  }
#endif
  return *from;
}

template <Reuse reuse, typename V>
SCHEDULEFREE_INLINE void store_once(V* to, const V& value) {
#if defined(__CUDA_ARCH__)
  if constexpr (reuse == Reuse::kNever) {
    constexpr std::size_t kBytes = sizeof(V) < 16 ? sizeof(V) : 16;
    using Word = typename WordOf<kBytes>::type;
    SCHEDULEFREE_UNROLL
    for (std::size_t i = 0; i < sizeof(V) / kBytes; ++i)
      __stcs(reinterpret_cast<Word*>(to) + i, reinterpret_cast<const Word*>(&value)[i]);
    return;
  }
#endif
  *to = value;
}

// Elements [i, i + width) of a stream of a piece.
template <int width, Reuse reuse, typename T, typename Piece, typename Index>
SCHEDULEFREE_INLINE void load(const Piece& piece, int stream, Index i, Vector<T, width>& values) {
  const T* const from = piece.template at<const T>(stream, i);
  if (width == 1 || piece.aligned(stream)) {
    values = load_once<reuse>(reinterpret_cast<const Vector<T, width>*>(from));
  } else {
    for (int e = 0; e < width; ++e) values.at[e] = from[e];
  }
}

template <int width, Reuse reuse, typename T, typename Piece, typename Index>
SCHEDULEFREE_INLINE void store(const Piece& piece, int stream, Index i, const Vector<T, width>& values) {
  T* const to = piece.template at<T>(stream, i);
  if (width == 1 || piece.aligned(stream)) {
    store_once<reuse>(reinterpret_cast<Vector<T, width>*>(to), values);
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

  template <Reuse reuse, typename Piece, typename Index>
  SCHEDULEFREE_MEMBER void load(const Piece& piece, int stream, int low_stream, Index i) {
    schedulefree::load<width, reuse>(piece, stream, i, word);
    if constexpr (Y::kHasLow) schedulefree::load<width, Reuse::kNever>(piece, low_stream, i, low);
  }

  template <typename Piece, typename Index>
  SCHEDULEFREE_MEMBER void store(const Piece& piece, int stream, int low_stream, Index i) const {
    schedulefree::store<width, Reuse::kSoon>(piece, stream, i, word);
    if constexpr (Y::kHasLow) schedulefree::store<width, Reuse::kNever>(piece, low_stream, i, low);
  }

  SCHEDULEFREE_MEMBER typename Y::Real wide(int e, bool fp16) const {
    return Y::widen(word.at[e], low.at[Y::kHasLow ? e : 0], fp16);
  }

  SCHEDULEFREE_MEMBER void set(int e, typename Y::Real x, bool fp16) {
    Y::narrow(x, word.at[e], low.at[Y::kHasLow ? e : 0], fp16);
  }
};

// ---- one step --------------------------------------------------------------------------------------

// The scalars of a step in the precision of its arithmetic.
template <typename Real_>
struct StepArgs {
  using Real = Real_;
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
  StepScalars step;
  AdamScalars adam;
  const double* coefs = nullptr;      // on the device: StepCoefficients in place of the scalars; or null
  const double* grad_norm = nullptr;  // on the device: gradients are clipped by it; or null
  double max_grad_norm = 0;
  bool y_fp16 = false, grad_fp16 = false;

  bool known_to_host() const { return coefs == nullptr && grad_norm == nullptr; }
};

// The scalars that a kernel goes by. Returns false where the step is skipped.
template <typename Real>
SCHEDULEFREE_INLINE bool resolve(const StepSource& source, StepArgs<Real>& args) {
  StepScalars step = source.step;
  AdamScalars adam = source.adam;
  if (source.coefs != nullptr) {
    const StepCoefficients coefs = step_coefficients(source.coefs);
    if (coefs.take == 0) return false;
    step = step_scalars(coefs, step.decay_at);
    adam = adam_scalars(coefs);
  }
  if (source.grad_norm != nullptr) step.grad_mul *= clip_factor(*source.grad_norm, source.max_grad_norm);
  args = StepArgs<Real>(step, adam, source.y_fp16, source.grad_fp16);
  return true;
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
    values.y.template load<Reuse::kSoon>(piece, kY, kLow, i);
    values.grad.template load<Reuse::kNever>(piece, kGrad, kGrad, i);
    load<width, Reuse::kNever>(piece, kZ, i, values.z);
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
    values.y.store(piece, kY, kLow, i);
    store<width, Reuse::kNever>(piece, kZ, i, values.z);
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
    values.y.template load<Reuse::kSoon>(piece, kY, kLow, i);
    values.grad.template load<Reuse::kNever>(piece, kGrad, kGrad, i);
    load<width, Reuse::kNever>(piece, kZ, i, values.z);
    load<width, Reuse::kNever>(piece, kV, i, values.v);
    if constexpr (has_inner) load<width, Reuse::kNever>(piece, kM, i, values.m);
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
    values.y.store(piece, kY, kLow, i);
    store<width, Reuse::kNever>(piece, kZ, i, values.z);
    store<width, Reuse::kNever>(piece, kV, i, values.v);
    if constexpr (has_inner) store<width, Reuse::kNever>(piece, kM, i, values.m);
  }
};

// ---- the swap --------------------------------------------------------------------------------------

template <typename Real_>
struct SwapArgs {
  using Real = Real_;
  Interpolation<Real> weight;
  bool y_fp16;

  SwapArgs(const SwapScalars& swap, bool y_fp16) : weight(swap.weight), y_fp16(y_fp16) {}
};

template <typename Y>
struct Swap {
  using Real = typename Y::Real;
  using Args = SwapArgs<Real>;
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
    values.y.template load<Reuse::kSoon>(piece, kY, kLow, i);
    load<width, Reuse::kNever>(piece, kZ, i, values.z);
  }

  template <int width, typename Piece>
  SCHEDULEFREE_INLINE void finish(const Piece& piece, std::int32_t i, Values<width>& values,
                                  const Args& args) {
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < width; ++e)
      values.y.set(e, interpolate(values.y.wide(e, args.y_fp16), values.z.at[e], args.weight), args.y_fp16);
    values.y.store(piece, kY, kLow, i);
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

// Updates every kThreads-th vector of a piece, `unroll` of them in flight together, and a loose element.
template <int unroll, typename Op, typename Piece>
SCHEDULEFREE_INLINE void update_piece(const typename Op::Args& args, const Piece& piece,
                                      std::int32_t thread) {
  constexpr int kWidth = Piece::kWidth;
  const std::int32_t vectors = piece.size / kWidth;
  SCHEDULEFREE_NO_UNROLL
  for (std::int32_t first = thread; first < vectors; first += unroll * kThreads) {
    typename Op::template Values<kWidth> values[unroll];
    SCHEDULEFREE_UNROLL
    for (int u = 0; u < unroll; ++u) {
      const std::int32_t i = first + u * kThreads;
      if (i < vectors) Op::template load_values<kWidth>(piece, i * kWidth, values[u]);
    }
    SCHEDULEFREE_UNROLL
    for (int u = 0; u < unroll; ++u) {
      const std::int32_t i = first + u * kThreads;
      if (i < vectors) Op::template finish<kWidth>(piece, i * kWidth, values[u], args);
    }
  }
  std::int32_t i = 0;
  if (loose_element(piece, thread, i)) {
    typename Op::template Values<1> values;
    Op::template load_values<1>(piece, i, values);
    Op::template finish<1>(piece, i, values, args);
  }
}

// ---- the swap that can be undone -------------------------------------------------------------------

// A wide value as it comes back from a parameter's memory.
template <typename Y>
struct Through {
  bool fp16;

  SCHEDULEFREE_MEMBER typename Y::Real operator()(typename Y::Real wide) const {
    if constexpr (sizeof(typename Y::Word) == 2 && !Y::kHasLow)
      return fp16 ? ThroughFp16{}(wide) : ThroughBf16{}(wide);
    return wide;
  }
};

template <typename Real_>
struct ExactSwapArgs {
  using Real = Real_;
  RoundTrip<Real> trip;
  bool y_fp16;

  ExactSwapArgs(const SwapScalars& swap, const SwapScalars& back, bool y_fp16)
      : trip(swap, back), y_fp16(y_fp16) {}
};

// Works on kVector elements in a row, one by one: what a thread keeps is in ascending order.
template <typename Y>
struct KeepingSwap {
  using Real = typename Y::Real;
  using Args = ExactSwapArgs<Real>;  // y -> x and back
  using Streams = typename Swap<Y>::Streams;
  static constexpr int kStreams = Swap<Y>::kStreams;

  static void streams(const TensorArgs& t, const Stream* (&streams)[kStreams]) {
    Swap<Y>::streams(t, streams);
  }

  SCHEDULEFREE_INLINE void element_sizes(int (&sizes)[kStreams]) { Swap<Y>::element_sizes(sizes); }

  struct Values {
    Real y[kVector], z[kVector];
    bool is_lost[kVector];
    std::int32_t size;
    std::int32_t lost;  // how many
  };

  // Elements [i, i + kVector) as far as the piece goes.
  template <typename Piece>
  SCHEDULEFREE_INLINE void load_values(const Piece& piece, std::int32_t i, Values& values, const Args& args) {
    const std::int32_t left = piece.size - i;
    values.size = left < 0 ? 0 : left < kVector ? left : kVector;
    values.lost = 0;
    SCHEDULEFREE_UNROLL
    for (std::int32_t e = 0; e < kVector; ++e) {
      values.is_lost[e] = false;
      if (e >= values.size) continue;
      Parameter<Y, 1> y;
      Vector<Real, 1> z;
      y.template load<Reuse::kSoon>(piece, Streams::kY, Streams::kLow, i + e);
      load<1, Reuse::kSoon>(piece, Streams::kZ, i + e, z);
      values.y[e] = y.wide(0, args.y_fp16);
      values.z[e] = z.at[0];
      values.is_lost[e] =
          differ(values.y[e], round_trip(values.y[e], z.at[0], args.trip, Through<Y>{args.y_fp16}));
      values.lost += values.is_lost[e];
    }
  }

  // Swaps them, and writes those that are lost from `at` and `value` on.
  template <typename Piece>
  SCHEDULEFREE_INLINE void finish(const Piece& piece, std::int32_t i, const Values& values, const Args& args,
                                  std::int64_t* at, double* value) {
    SCHEDULEFREE_UNROLL
    for (std::int32_t e = 0; e < kVector; ++e) {
      if (e >= values.size) continue;
      if (values.is_lost[e]) {
        *at++ = piece.begin + i + e;
        *value++ = static_cast<double>(values.y[e]);
      }
      Parameter<Y, 1> x;
      x.set(0, interpolate(values.y[e], values.z[e], args.trip.swap), args.y_fp16);
      x.store(piece, Streams::kY, Streams::kLow, i + e);
    }
  }
};

// Puts kept values back into a parameter that has just been swapped from x to y, where the two swaps still
// make of the value what the parameter holds.
template <typename Y>
struct RestoreKept {
  using Real = typename Y::Real;
  using Args = ExactSwapArgs<Real>;  // y -> x and back
  enum Streams : int { kY, kZ, kAt, kValue, kLow };
  static constexpr int kStreams = Y::kHasLow ? 5 : 4;

  static void streams(const TensorArgs& t, const Stream& at, const Stream& value,
                      const Stream* (&streams)[kStreams]) {
    streams[kY] = &t.y;
    streams[kZ] = &t.z;
    streams[kAt] = &at;
    streams[kValue] = &value;
    if constexpr (Y::kHasLow) streams[kLow] = &t.y_lo;
  }

  SCHEDULEFREE_INLINE void element_sizes(int (&sizes)[kStreams]) {
    sizes[kY] = sizeof(typename Y::Word);
    sizes[kZ] = sizeof(Real);
    sizes[kAt] = sizeof(std::int64_t);
    sizes[kValue] = sizeof(double);
    if constexpr (Y::kHasLow) sizes[kLow] = sizeof(std::int16_t);
  }

  // The i-th of a piece of the lists, in the tensor as a whole.
  template <typename Piece>
  SCHEDULEFREE_INLINE void restore(const Piece& piece, const Piece& whole, std::int32_t i, const Args& args) {
    const std::int64_t at = *piece.template in_list<const std::int64_t>(kAt, i);
    const Real was = static_cast<Real>(*piece.template in_list<const double>(kValue, i));
    Parameter<Y, 1> y;
    Vector<Real, 1> z;
    y.template load<Reuse::kSoon>(whole, kY, kLow, at);
    load<1, Reuse::kSoon>(whole, kZ, at, z);
    if (differ(y.wide(0, args.y_fp16), round_trip(was, z.at[0], args.trip, Through<Y>{args.y_fp16}))) return;
    y.set(0, was, args.y_fp16);
    y.store(whole, kY, kLow, at);
  }
};

// ---- sums ------------------------------------------------------------------------------------------

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
    grad.template load<Reuse::kSoon>(piece, kGrad, kGrad, i);
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
    y.template load<Reuse::kSoon>(piece, kY, kLow, i);
    grad.template load<Reuse::kSoon>(piece, kGrad, kGrad, i);
    load<width, Reuse::kSoon>(piece, kZ, i, z);
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < width; ++e) {
      const double g = static_cast<double>(grad.wide(e, args.grad_fp16));
      total.at[0] += g < 0 ? -g : g;
      total.at[1] += g * (static_cast<double>(z.at[e]) - static_cast<double>(y.wide(e, args.y_fp16)));
    }
  }
};

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
