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

#include "coefficients.h"

// On a device, loops over the elements of a vector must leave nothing indexed, and others that are marked
// keep the registers of one pass.
#if defined(__CUDA_ARCH__)
#define SCHEDULEFREE_UNROLL _Pragma("unroll")
#define SCHEDULEFREE_NO_UNROLL _Pragma("unroll 1")
#else
#define SCHEDULEFREE_UNROLL
#define SCHEDULEFREE_NO_UNROLL
#endif

namespace schedulefree {

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

// ---- the formula -----------------------------------------------------------------------------------

template <typename Real>
SCHEDULEFREE_INLINE Real interpolate(Real p, Real q, const Interpolation<Real>& weight) {
  // Compared here and not once for all elements: GCC does not vectorise a choice by a bool.
  const bool near_p = weight.from_p < static_cast<Real>(0.5);
  return fma_once(near_p ? weight.from_p : weight.from_q, q - p, near_p ? p : q);
}

// y' = y + w * (z - y) + a * u,  z' = z - lr * u,  with u decayed at y or z (arXiv 2405.15682, section 4,
// rewritten so that x is never stored). The caller settles y'.
template <typename Real>
SCHEDULEFREE_INLINE void apply_update(Real& y, Real& z, Real u, DecayAt decay_at,
                                      const StepScalars<Real>& s) {
  if (decay_at == DecayAt::kY) u = fma_once(s.weight_decay, y, u);
  if (decay_at == DecayAt::kZ) u = fma_once(s.weight_decay, z, u);
  y = fma_once(s.a, u, interpolate(y, z, s.w));
  z = fma_once(s.minus_lr, u, z);
}

template <typename Real>
SCHEDULEFREE_INLINE void sgd_update(Real& y, Real grad, Real& z, DecayAt decay_at,
                                    const StepScalars<Real>& s) {
  apply_update(y, z, grad * s.grad_mul, decay_at, s);
}

// `m` is read and written only when `has_inner`.
template <bool has_inner, typename Real>
SCHEDULEFREE_INLINE void adamw_update(Real& y, Real grad, Real& z, Real& v, Real& m, DecayAt decay_at,
                                      const StepScalars<Real>& s) {
  const Real g = grad * s.grad_mul;
  // (1 - beta2) * g first: the product then overflows only where v itself does.
  v = fma_once(s.one_minus_beta2 * g, g, s.beta2 * v);
  Real numerator = g;
  if (has_inner) {
    m = fma_once(s.one_minus_inner, g, s.inner * m);
    numerator = m;
  }
  const Real denominator = fma_once(s.denom_scale, square_root(v), s.denom_eps);
  apply_update(y, z, numerator / denominator, decay_at, s);
}

// ---- swaps, and a y that they give back exactly ------------------------------------------------------

// Keeps `from` where `to` is an infinity or a NaN. Integer arithmetic, for the sake of SSE2.
SCHEDULEFREE_INLINE float finite_or(float to, float from) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(to);
  const std::uint32_t keep = 0 - (((bits & 0x7FFFFFFFu) + 0x00800000u) >> 31);
  return bit_cast<float>((bit_cast<std::uint32_t>(from) & keep) | (bits & ~keep));
}

SCHEDULEFREE_INLINE double finite_or(double to, double from) {
  const std::uint64_t bits = bit_cast<std::uint64_t>(to);
  const std::uint64_t keep = 0 - (((bits & 0x7FFFFFFFFFFFFFFFu) + 0x0010000000000000u) >> 63);
  return bit_cast<double>((bit_cast<std::uint64_t>(from) & keep) | (bits & ~keep));
}

// One swap: p + weight * (z - p), with many more digits than Real has, to be rounded once to the format of
// the parameter. For float that is float64, multiplied and added apart.
SCHEDULEFREE_INLINE double swapped(float p, float z, const SwapWeight& s) {
  const double wide = static_cast<double>(p);
  return wide + s.hi * (static_cast<double>(z) - wide);
}

// For double it is a sum of two doubles, whose errors are computed exactly (Knuth, TAOCP 4.2.2; Dekker).
SCHEDULEFREE_INLINE double swapped(double p, double z, const SwapWeight& s) {
  const double difference = z - p;
  const double minus_p = difference - z;
  const double difference_lo = (z - (difference - minus_p)) - (p + minus_p);
  const double product = s.hi * difference;
  const double product_lo = fma_once(s.hi, difference, -product) + (s.hi * difference_lo + s.lo * difference);
  const double sum = p + product;
  const double p_again = sum - product;
  const double sum_lo = (p - p_again) + (product - (sum - p_again));
  return finite_or(sum + (sum_lo + product_lo), sum);
}

SCHEDULEFREE_INLINE bool power_of_two(float x) { return (bit_cast<std::uint32_t>(x) & 0x007FFFFFu) == 0; }
SCHEDULEFREE_INLINE bool power_of_two(double x) {
  return (bit_cast<std::uint64_t>(x) & 0x000FFFFFFFFFFFFFu) == 0;
}

// A swap to x and one back, where `Y` is the parameter's format (storage.h). y stays as it is where it or x
// is not finite: what comes back from such an x is not finite either. Sets a bit of `again` where what comes
// back may move once more: a power of two is closer to its neighbour on one side.
template <typename Y, typename Real>
SCHEDULEFREE_INLINE Real round_trip(Real y, Real z, const SettleScalars& s, std::uint32_t& again) {
  const Real x = Y::rounded(swapped(y, z, s.to_x));
  const Real back = finite_or(Y::rounded(swapped(x, z, s.to_y)), y);
  again |= static_cast<std::uint32_t>(power_of_two(x)) | static_cast<std::uint32_t>(power_of_two(back));
  return back;
}

// The y that are stored in place of what a step gave, rounded: a swap to x and one back return each bit for
// bit, and settling it again changes nothing.
//
// One or two round trips give such a y; one more changes nothing, so that elements are settled side by side.
template <typename Y, int count, typename Real>
SCHEDULEFREE_INLINE void settle(Real* y, const Real* z, const SettleScalars& s) {
  std::uint32_t again = 1;
  SCHEDULEFREE_NO_UNROLL
  for (int trip = 0; trip < 2 && again; ++trip) {
    again = 0;
    SCHEDULEFREE_UNROLL
    for (int e = 0; e < count; ++e) y[e] = round_trip<Y>(y[e], z[e], s, again);
  }
}

// Returns 0 where settle() does not change a y; another number where it may. Cheaper than settle().
// Says nothing where always_moves().
//
// A round trip moves y only where x, rounded, has a larger exponent than the value next to y on the side of
// zero; elsewhere its error is less than half the distance to a neighbour of y. x is computed in float here,
// a ten-thousandth larger: that is more than what rounding adds to x, at most 2^-17 of it, and the error,
// (4 + 4 / beta) * 2^-24 of x where x is no smaller than y. (Rounding adds more to a format's smallest
// numbers, which are equally far apart whatever their exponents: none of them moves.)
SCHEDULEFREE_INLINE std::uint8_t may_move(float y, float z, const SettleScalars& s) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const float x = __builtin_fmaf(y, s.bound_y, z * s.bound_z);
#else
  const float x = y * s.bound_y + z * s.bound_z;
#endif
  return static_cast<std::uint8_t>((bit_cast<std::uint32_t>(x) ^ (bit_cast<std::uint32_t>(y) - 1)) >> 23);
}

// In float64 a test would cost as much as settling.
SCHEDULEFREE_INLINE std::uint8_t may_move(double, double, const SettleScalars&) { return 1; }

// True where any element may move: beta is too near to 1 or to 0 for may_move().
SCHEDULEFREE_INLINE bool always_moves(const SettleScalars& s) {
  return s.to_y.hi < 0x1p-26 || s.to_y.hi > 0.95;
}

// ---- around the step of a base optimizer -------------------------------------------------------------
//
// The base steps z, for whose time y is given up: x takes its place, from which the next y is made.

// Turns y into x, as a swap does, and decays z at the y that was.
template <typename Y, typename Real>
SCHEDULEFREE_INLINE void before_base_step(Real& y, Real& z, const SwapWeight& to_x,
                                          const StepScalars<Real>& s) {
  const Real minus_decay = s.minus_lr * s.weight_decay;
  const Real decayed = fma_once(minus_decay, y, z);
  y = Y::rounded(swapped(y, z, to_x));
  z = minus_decay == 0 ? z : decayed;
}

// Turns x into the y of x' = x + w * (z - x) and of the base's z. The caller settles it.
//
// x' is x or z, whatever the other is, where w is 0 or 1: then a y that was settled comes back.
template <typename Y, typename Real>
SCHEDULEFREE_INLINE void after_base_step(Real& y, Real z, const StepScalars<Real>& s) {
  const Real mean = interpolate(y, z, s.w);
  const Real x = s.w.from_p == 0 ? y : s.w.from_q == 0 ? z : mean;
  y = Y::rounded(swapped(x, z, s.settle.to_y));
}

}  // namespace schedulefree
