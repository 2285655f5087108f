// The arithmetic of Schedule-Free learning (Defazio et al., arXiv 2405.15682), one element at a time.
//
// Contract: every backend calls these functions and nothing else for the update, and every
// translation unit is compiled with floating-point contraction off, so equal inputs give equal bits on
// every instruction set and device. Functions have internal linkage and are always inlined: a unit
// compiled for AVX-512 must not lend its code to a unit that runs on any machine.
//
// No torch, no loops, no memory access beyond the references passed in.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SCHEDULEFREE_MEMBER __host__ __device__ __forceinline__
#else
#define SCHEDULEFREE_MEMBER inline __attribute__((always_inline))
#endif
#define SCHEDULEFREE_INLINE static SCHEDULEFREE_MEMBER

namespace schedulefree {

// Where decoupled weight decay is evaluated. The values are those of the operators' `decay_at`.
enum class DecayAt : std::int8_t { kY = 0, kZ = 1, kNowhere = 2 };

// Scalars of one optimizer step, as the operators receive them. schedule.h computes them.
struct StepScalars {
  double lr = 0;            // z' = z - lr * u
  double w = 0;             // y' = y + w * (z - y) + a * u
  double a = 0;             //
  double weight_decay = 0;  // u += weight_decay * (y or z)
  double grad_mul = 1;      // g = grad * grad_mul
  DecayAt decay_at = DecayAt::kY;
};

// u = n / (denom_scale * sqrt(v) + denom_eps), with n the gradient or its running mean.
struct AdamScalars {
  double beta2 = 0;
  double inner_momentum = 0;  // 0: n is the gradient and no running mean is kept
  double denom_scale = 1;
  double denom_eps = 0;
};

// p' = p + weight * (z - p): the swap between y and x.
struct SwapScalars {
  double weight = 0;
};

// ---- single operations -----------------------------------------------------------------------------

template <typename To, typename From>
SCHEDULEFREE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// a * b + c, rounded once.
SCHEDULEFREE_INLINE float fma_once(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  // Without the instruction libm takes a call per element. The product is exact in double; rounding
  // the sum to odd there makes the second rounding, to float, the only one that counts (Boldo and
  // Melquiond, "Emulation of FMA and correctly rounded sums", IEEE TC 2008).
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = c;
  const double sum = product + addend;
  const double virtual_addend = sum - product;
  const double error = (product - (sum - virtual_addend)) + (addend - virtual_addend);
  // Integer arithmetic throughout: comparisons would keep the loop from being vectorised for SSE2.
  const std::uint64_t bits = bit_cast<std::uint64_t>(sum);
  const std::uint64_t error_bits = bit_cast<std::uint64_t>(error);
  const std::uint64_t magnitude = error_bits << 1;
  const std::uint64_t inexact = (magnitude | (0 - magnitude)) >> 63;
  const std::uint64_t finite = ~(((bits & 0x7FF0000000000000u) + 0x0010000000000000u) >> 63);
  const std::uint64_t to_odd = inexact & finite & ~bits;              // 1 or 0
  const std::uint64_t toward_zero = 0 - ((error_bits ^ bits) >> 63);  // all ones or 0
  return static_cast<float>(bit_cast<double>(bits + ((to_odd ^ toward_zero) - toward_zero)));
#endif
}

SCHEDULEFREE_INLINE double fma_once(double a, double b, double c) { return __builtin_fma(a, b, c); }

SCHEDULEFREE_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
SCHEDULEFREE_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// ---- 16-bit formats --------------------------------------------------------------------------------

SCHEDULEFREE_INLINE float bf16_to_float(std::uint16_t h) {
  return bit_cast<float>(static_cast<std::uint32_t>(h) << 16);
}

// Round to nearest, ties to even; every NaN becomes the canonical quiet one.
SCHEDULEFREE_INLINE std::uint16_t float_to_bf16(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// An fp32 value as a bf16 (rounded to nearest, ties away from zero) and the signed 16 bits that turn it
// back into the same fp32 bits. A NaN is made canonical first, or its payload could round to infinity.
SCHEDULEFREE_INLINE void split_float(float x, std::uint16_t& hi, std::int16_t& lo) {
  std::uint32_t bits = bit_cast<std::uint32_t>(x);
  bits = (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : bits;
  hi = static_cast<std::uint16_t>((bits + 0x8000u) >> 16);
  lo = static_cast<std::int16_t>(static_cast<std::uint16_t>(bits));
}

SCHEDULEFREE_INLINE float join_float(std::uint16_t hi, std::int16_t lo) {
  return bit_cast<float>((static_cast<std::uint32_t>(hi) << 16) +
                         static_cast<std::uint32_t>(static_cast<std::int32_t>(lo)));
}

SCHEDULEFREE_INLINE float fp16_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t magnitude = h & 0x7FFFu;
  // Normal numbers and infinities: move the fields and rebias. Multiplying by 2^112 rebias exactly;
  // the exponent 31 of infinities and NaNs is raised to 255 by hand.
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);
  const std::uint32_t special = magnitude >= 0x7C00u ? 0x7F800000u : 0u;
  return bit_cast<float>(bit_cast<std::uint32_t>(scaled) | special | sign);
}

// Round to nearest, ties to even; every NaN becomes the canonical quiet one.
SCHEDULEFREE_INLINE std::uint16_t float_to_fp16(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Subnormal results: adding 0.5 aligns the last fp16 bit with the last fp32 bit, so the addition
  // itself rounds.
  const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  std::uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x47800000u ? 0x7C00u : h;
  h = magnitude > 0x7F800000u ? 0x7E00u : h;
  return static_cast<std::uint16_t>(h | ((bits >> 16) & 0x8000u));
}

// ---- the formula -----------------------------------------------------------------------------------

// p + weight * (q - p), anchored at the end that is nearer, so that weight 1 gives q exactly.
template <typename Real>
struct Interpolation {
  Real from_p;
  Real from_q;
  bool near_p;

  Interpolation() = default;
  SCHEDULEFREE_MEMBER explicit Interpolation(double weight)
      : from_p(static_cast<Real>(weight)), from_q(static_cast<Real>(weight - 1)), near_p(weight < 0.5) {}
};

template <typename Real>
SCHEDULEFREE_INLINE Real interpolate(Real p, Real q, const Interpolation<Real>& weight) {
  const Real difference = q - p;
  return fma_once(weight.near_p ? weight.from_p : weight.from_q, difference, weight.near_p ? p : q);
}

// StepScalars in the precision of the arithmetic.
template <typename Real>
struct StepCoefs {
  Interpolation<Real> w;
  Real a, minus_lr, weight_decay, grad_mul;

  StepCoefs() = default;
  SCHEDULEFREE_MEMBER explicit StepCoefs(const StepScalars& s)
      : w(s.w),
        a(static_cast<Real>(s.a)),
        minus_lr(static_cast<Real>(-s.lr)),
        weight_decay(static_cast<Real>(s.weight_decay)),
        grad_mul(static_cast<Real>(s.grad_mul)) {}
};

template <typename Real>
struct AdamCoefs {
  Real beta2, one_minus_beta2, inner, one_minus_inner, denom_scale, denom_eps;

  AdamCoefs() = default;
  SCHEDULEFREE_MEMBER explicit AdamCoefs(const AdamScalars& s)
      : beta2(static_cast<Real>(s.beta2)),
        one_minus_beta2(static_cast<Real>(1 - s.beta2)),
        inner(static_cast<Real>(s.inner_momentum)),
        one_minus_inner(static_cast<Real>(1 - s.inner_momentum)),
        denom_scale(static_cast<Real>(s.denom_scale)),
        denom_eps(static_cast<Real>(s.denom_eps)) {}
};

// y' = y + w * (z - y) + a * u,  z' = z - lr * u,  with u decayed at y or z (arXiv 2405.15682, section 4,
// rewritten so that x is never stored).
template <typename Real>
SCHEDULEFREE_INLINE void apply_update(Real& y, Real& z, Real u, DecayAt decay_at, const StepCoefs<Real>& s) {
  if (decay_at == DecayAt::kY) u = fma_once(s.weight_decay, y, u);
  if (decay_at == DecayAt::kZ) u = fma_once(s.weight_decay, z, u);
  y = fma_once(s.a, u, interpolate(y, z, s.w));
  z = fma_once(s.minus_lr, u, z);
}

template <typename Real>
SCHEDULEFREE_INLINE void sgd_update(Real& y, Real grad, Real& z, DecayAt decay_at, const StepCoefs<Real>& s) {
  apply_update(y, z, grad * s.grad_mul, decay_at, s);
}

// `m` is read and written only when `has_inner`.
template <bool has_inner, typename Real>
SCHEDULEFREE_INLINE void adamw_update(Real& y, Real grad, Real& z, Real& v, Real& m, DecayAt decay_at,
                                      const StepCoefs<Real>& s, const AdamCoefs<Real>& adam) {
  const Real g = grad * s.grad_mul;
  // (1 - beta2) * g first: the product then overflows only where v itself does.
  v = fma_once(adam.one_minus_beta2 * g, g, adam.beta2 * v);
  Real numerator = g;
  if (has_inner) {
    m = fma_once(adam.one_minus_inner, g, adam.inner * m);
    numerator = m;
  }
  const Real denominator = fma_once(adam.denom_scale, square_root(v), adam.denom_eps);
  apply_update(y, z, numerator / denominator, decay_at, s);
}

// ---- a swap that is undone --------------------------------------------------------------------------

// A wide value as it would come back from the parameter's memory.
struct AsItIs {
  template <typename Real>
  SCHEDULEFREE_MEMBER Real operator()(Real wide) const {
    return wide;
  }
};

struct ThroughFp16 {
  SCHEDULEFREE_MEMBER float operator()(float wide) const { return fp16_to_float(float_to_fp16(wide)); }
};

struct ThroughBf16 {
  SCHEDULEFREE_MEMBER float operator()(float wide) const { return bf16_to_float(float_to_bf16(wide)); }
};

SCHEDULEFREE_INLINE std::uint32_t bits_of(float x) { return bit_cast<std::uint32_t>(x); }
SCHEDULEFREE_INLINE std::uint64_t bits_of(double x) { return bit_cast<std::uint64_t>(x); }

// Whether two values differ in a bit; NaNs are all one.
template <typename Real>
SCHEDULEFREE_INLINE bool differ(Real a, Real b) {
  return (bits_of(a) != bits_of(b)) & !((a != a) & (b != b));
}

// What the two swaps make of a value that goes through the parameter's memory in between.
template <typename Real>
struct RoundTrip {
  Interpolation<Real> swap, back;

  SCHEDULEFREE_MEMBER RoundTrip(const SwapScalars& swap, const SwapScalars& back)
      : swap(swap.weight), back(back.weight) {}
};

template <typename Real, typename Storage>
SCHEDULEFREE_INLINE Real round_trip(Real y, Real z, const RoundTrip<Real>& trip, const Storage& through) {
  return through(interpolate(through(interpolate(y, z, trip.swap)), z, trip.back));
}

}  // namespace schedulefree
