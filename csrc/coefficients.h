// The scalars of a step: by name and in double, as the operators take them, and in the precision of the
// arithmetic, as every kernel does.
//
// Plain C++ that host and devices compile; schedule.h computes the former.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define SCHEDULEFREE_HOST_DEVICE __host__ __device__
#define SCHEDULEFREE_MEMBER __host__ __device__ __forceinline__
#define SCHEDULEFREE_NOINLINE __host__ __device__ __noinline__
#else
#define SCHEDULEFREE_HOST_DEVICE
#define SCHEDULEFREE_MEMBER inline __attribute__((always_inline))
#define SCHEDULEFREE_NOINLINE
#endif
// Internal linkage: a unit compiled for AVX-512 must not lend its code to a unit that runs on any machine.
#define SCHEDULEFREE_INLINE static SCHEDULEFREE_MEMBER

namespace schedulefree {

/// Where decoupled weight decay is evaluated. The values are those of the operators' `decay_at`.
enum class DecayAt : std::int8_t {
  kY = 0,        ///< At y, where gradients are taken.
  kZ = 1,        ///< At z.
  kNowhere = 2,  ///< Of a step without decay; no value of the option.
};

// ---- swaps -----------------------------------------------------------------------------------------

// The weight of z in a swap p' = p + weight * (z - p), to twice the precision of a double: hi + lo. Only
// float64 parameters need lo.
struct SwapWeight {
  double hi = 0, lo = 0;
};

// The weight that turns x into y = beta * x + (1 - beta) * z.
SCHEDULEFREE_INLINE SwapWeight x_to_y_weight(double beta) {
  const double hi = 1 - beta;
  return {hi, (1 - hi) - beta};  // exact, for beta is at most 1 (Dekker, Numer. Math. 18, 1971)
}

// The weight that turns y into x: (beta - 1) / beta.
SCHEDULEFREE_INLINE SwapWeight y_to_x_weight(double beta) {
  const SwapWeight back = x_to_y_weight(beta);
  const double hi = -back.hi / beta;
  return {hi, (std::fma(-hi, beta, -back.hi) - back.lo) / beta};
}

// ---- by name ---------------------------------------------------------------------------------------

// The scalars that a step operator takes, by name, in the order of a `coefs` tensor (float64):
//
//   take            0 skips the step: kernels return at once
//   lr              z' = z - lr * u
//   w, a            y' = y + w * (z - y) + a * u
//   weight_decay    u += weight_decay * (y or z)
//   grad_mul        g = grad * grad_mul
//   beta2           v' = beta2 * v + (1 - beta2) * g * g
//   denom_scale, denom_eps    u = n / (denom_scale * sqrt(v') + denom_eps)
//   inner_momentum  n = m' = inner_momentum * m + (1 - inner_momentum) * g; 0: n = g
//   beta            builds y', and so settles it
//   stochastic      1: what is stored in 24 bits is rounded at random, by a key that k gives
//   k, weight_sum, lr_max, scheduled_lr    the schedule before the step, for a caller that is refused
// clang-format off
#define SCHEDULEFREE_COEFFICIENTS(X)                                                       \
  X(take) X(lr) X(w) X(a) X(weight_decay) X(grad_mul) X(beta2) X(denom_scale) X(denom_eps) \
  X(inner_momentum) X(beta) X(stochastic) X(k) X(weight_sum) X(lr_max) X(scheduled_lr)
// clang-format on

struct StepCoefficients {
#define SCHEDULEFREE_MEMBER_DOUBLE(name) double name = 0;
  SCHEDULEFREE_COEFFICIENTS(SCHEDULEFREE_MEMBER_DOUBLE)
#undef SCHEDULEFREE_MEMBER_DOUBLE
};

constexpr std::int64_t kStepCoefficients = sizeof(StepCoefficients) / sizeof(double);

// What a `coefs` tensor holds. Field by field: a device would copy the whole byte by byte.
SCHEDULEFREE_INLINE StepCoefficients step_coefficients(const double* coefs) {
  StepCoefficients result;
#define SCHEDULEFREE_READ(name) result.name = *coefs++;
  SCHEDULEFREE_COEFFICIENTS(SCHEDULEFREE_READ)
#undef SCHEDULEFREE_READ
  return result;
}

// The way back.
SCHEDULEFREE_INLINE void store_coefficients(const StepCoefficients& step, double* coefs) {
#define SCHEDULEFREE_WRITE(name) *coefs++ = step.name;
  SCHEDULEFREE_COEFFICIENTS(SCHEDULEFREE_WRITE)
#undef SCHEDULEFREE_WRITE
}

// ---- in the precision of the arithmetic ------------------------------------------------------------

// A permutation of 32 bits without visible pattern (C. Wellons, "Prospecting for hash functions", lowbias32).
SCHEDULEFREE_INLINE std::uint32_t scrambled(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// p + weight * (q - p), anchored at the end that is nearer, so that weight 1 gives q exactly.
template <typename Real>
struct Interpolation {
  Real from_p;
  Real from_q;

  Interpolation() = default;
  SCHEDULEFREE_MEMBER explicit Interpolation(double weight)
      : from_p(static_cast<Real>(weight)), from_q(static_cast<Real>(weight - 1)) {}
};

// The two swaps that settle y.
struct SettleScalars {
  SwapWeight to_x, to_y;
  float bound_y, bound_z;  // x is about y * bound_y + z * bound_z, and no larger

  SettleScalars() = default;
  SCHEDULEFREE_MEMBER explicit SettleScalars(double beta)
      : to_x(y_to_x_weight(beta)),
        to_y(x_to_y_weight(beta)),
        bound_y(static_cast<float>(1.0001 * (1 - to_x.hi))),
        bound_z(static_cast<float>(1.0001 * to_x.hi)) {}
};

// StepCoefficients as the kernels have them.
template <typename Real>
struct StepScalars {
  Interpolation<Real> w;
  Real a, minus_lr, weight_decay, grad_mul;
  Real beta2, one_minus_beta2, inner, one_minus_inner, denom_scale, denom_eps;  // of Adam's relatives
  SettleScalars settle;                                                         // for the beta that builds y'
  std::uint32_t random;      // key of this step's random numbers (storage.h)
  std::uint32_t stochastic;  // not 0: what is stored in 24 bits is rounded by them

  StepScalars() = default;
  SCHEDULEFREE_MEMBER explicit StepScalars(const StepCoefficients& c)
      : w(c.w),
        a(static_cast<Real>(c.a)),
        minus_lr(static_cast<Real>(-c.lr)),
        weight_decay(static_cast<Real>(c.weight_decay)),
        grad_mul(static_cast<Real>(c.grad_mul)),
        beta2(static_cast<Real>(c.beta2)),
        one_minus_beta2(static_cast<Real>(1 - c.beta2)),
        inner(static_cast<Real>(c.inner_momentum)),
        one_minus_inner(static_cast<Real>(1 - c.inner_momentum)),
        denom_scale(static_cast<Real>(c.denom_scale)),
        denom_eps(static_cast<Real>(c.denom_eps)),
        settle(c.beta),
        random(scrambled(static_cast<std::uint32_t>(static_cast<std::int64_t>(c.k)) + 1)),
        stochastic(c.stochastic != 0 ? 1 : 0) {}
};

}  // namespace schedulefree
