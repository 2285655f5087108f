// The schedule of Schedule-Free learning: the scalars of one step of a parameter group, in double.
//
// Plain C++ without torch. The Python facade reaches it through the module `_C`, the C++ facade includes it,
// and schedule_step_ computes it where the parameters are. Formulas: Defazio et al., "The Road Less
// Scheduled", arXiv 2405.15682, section 4. What a device may call is marked SCHEDULEFREE_HOST_DEVICE; it
// throws nothing.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>

#include "hyperparameters.h"

#if defined(__CUDACC__)
#define SCHEDULEFREE_HOST_DEVICE __host__ __device__
#else
#define SCHEDULEFREE_HOST_DEVICE
#endif

namespace schedulefree {

namespace detail {

inline void require(bool ok, const char* name, double value, const char* domain) {
  if (ok) return;
  std::ostringstream message;
  message << "Invalid " << name << ": " << value << ", expected " << domain;
  throw std::invalid_argument(message.str());
}

}  // namespace detail

// The weight of z in a swap, to twice the precision of a double: hi + lo. Only float64 parameters need lo.
struct SwapWeight {
  double hi = 0, lo = 0;
};

// The weight that turns x into y = beta * x + (1 - beta) * z.
SCHEDULEFREE_HOST_DEVICE inline SwapWeight x_to_y_weight(double beta) {
  const double hi = 1 - beta;
  return {hi, (1 - hi) - beta};  // exact, for beta is at most 1 (Dekker, Numer. Math. 18, 1971)
}

// The weight that turns y into x: (beta - 1) / beta.
SCHEDULEFREE_HOST_DEVICE inline SwapWeight y_to_x_weight(double beta) {
  const SwapWeight back = x_to_y_weight(beta);
  const double hi = -back.hi / beta;
  return {hi, (std::fma(-hi, beta, -back.hi) - back.lo) / beta};
}

// ---- what the optimizers differ in -------------------------------------------------------------------

// The values are those of schedule_step_'s `kind`.
enum class StepKind : std::int8_t { kSgd = 0, kAdamW = 1, kAdamWPaper = 2, kRAdam = 3, kPlus = 4 };

inline constexpr const char* kStepKindNames[] = {"sgd", "adamw", "adamw_paper", "radam", "plus"};

// Hyperparameters of the relatives of Adam.
struct AdamOptions {
  double beta2 = 0;
  double eps = 0;
  double inner_momentum = 0;
  bool silent_sgd_phase = true;  // RAdam
};

// How a kind scales one step.
struct StepFactors {
  double lr_factor = 1;    // beside warmup
  double denom_scale = 1;  // u = n / (denom_scale * sqrt(v) + denom_eps)
  double denom_eps = 0;
};

namespace detail {

// 1 - base^exponent for a base in [0, 1). The plain difference would lose as many digits as base^exponent has
// nines, and a device, whose pow rounds otherwise, would not agree.
SCHEDULEFREE_HOST_DEVICE inline double one_minus_power(double base, double exponent) {
  return -std::expm1(exponent * std::log(base));
}

// (1 - beta1^t) * (sqrt(v / (1 - beta2^t)) + eps) with t = k + 1 and beta1 the inner momentum: both bias
// corrections of Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) in two scalars.
SCHEDULEFREE_HOST_DEVICE inline StepFactors adam_factors(std::int64_t k, const AdamOptions& adam) {
  const double t = static_cast<double>(k + 1);
  const double correction1 = one_minus_power(adam.inner_momentum, t);
  const double correction2 = one_minus_power(adam.beta2, t);
  return {1, correction1 / std::sqrt(correction2), correction1 * adam.eps};
}

// RAdam (Liu et al., arXiv 1908.03265, algorithm 2). While the variance of the gradient cannot be estimated,
// u is the gradient; a silent SGD phase takes no step then.
SCHEDULEFREE_HOST_DEVICE inline StepFactors radam_factors(std::int64_t k, const AdamOptions& adam) {
  const double t = static_cast<double>(k + 1);
  const double beta2_t = std::pow(adam.beta2, t);
  const double rho_inf = 2 / (1 - adam.beta2) - 1;
  const double rho = rho_inf - 2 * t * beta2_t / one_minus_power(adam.beta2, t);
  if (!(rho > 4)) return {adam.silent_sgd_phase ? 0.0 : 1.0, 0, 1};
  StepFactors factors = adam_factors(k, adam);
  factors.lr_factor = std::sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho));
  return factors;
}

}  // namespace detail

SCHEDULEFREE_HOST_DEVICE inline StepFactors step_factors(StepKind kind, std::int64_t k,
                                                         const AdamOptions& adam) {
  switch (kind) {
    case StepKind::kSgd:
      break;
    case StepKind::kAdamW:
    case StepKind::kPlus:
      return detail::adam_factors(k, adam);
    case StepKind::kAdamWPaper:
      // Corrects the learning rate for the bias of v, where Adam corrects v.
      return {std::sqrt(detail::one_minus_power(adam.beta2, static_cast<double>(k + 1))), 1, adam.eps};
    case StepKind::kRAdam:
      return detail::radam_factors(k, adam);
  }
  return {};
}

// ---- one step ------------------------------------------------------------------------------------------

// What a group carries from step to step.
struct ScheduleState {
  std::int64_t k = 0;     // steps taken
  double weight_sum = 0;  // sum of the averaging weights so far
  double lr_max = -1;     // largest learning rate so far; negative before the first step
};

// What the host says of a step.
struct StepRule {
  StepKind kind = StepKind::kSgd;
  AdamOptions adam;
  double beta = 0.9;       // interpolation weight that built the current y
  double beta_next = 0.9;  // the one for the next y
  double warmup_steps = 0;
  std::int64_t c_warmup = 0;  // steps during which x follows z: c is 1 and no averaging weight is counted
  double r = 0;
  double weight_lr_power = 2;
  double decoupling_c = 0;      // above 0, c becomes min(1, c * (1 - beta_next) * decoupling_c)
  double averaging_weight = 0;  // above 0, c is this
  double lr_factor = 1;         // of this step alone, beside warmup and kind
  bool stochastic = false;      // rounding of 24-bit parameters
  bool maximize = false;
  bool clips = false;
  double max_grad_norm = 0;
};

// What a step reads where the schedule is kept.
struct StepInputs {
  double lr = 0;
  double weight_decay = 0;
  double grad_norm = 0;   // of the gradients as they are, scaled by grad_scale
  double grad_scale = 1;  // gradients are this many times what they should be
  double found_inf = 0;   // anything but 0 skips the step
};

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

inline constexpr const char* kCoefficientNames[] = {
#define SCHEDULEFREE_NAME(name) #name,
    SCHEDULEFREE_COEFFICIENTS(SCHEDULEFREE_NAME)
#undef SCHEDULEFREE_NAME
};

constexpr std::int64_t kStepCoefficients = sizeof(StepCoefficients) / sizeof(double);

// The scalars of a step, and the group's schedule after it.
struct ScheduleStep {
  StepCoefficients coefs;
  ScheduleState next;
  double scheduled_lr = 0;  // step size of z: after warmup and factors
  double c = 0;             // weight of the new z in the average x
};

namespace detail {

// Factor on gradients of this norm, as torch.nn.utils.clip_grad_norm_ has it. An infinite limit only
// measures.
SCHEDULEFREE_HOST_DEVICE inline double clip_factor(double norm, double max_norm) {
  if (max_norm > DBL_MAX) return 1;
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1 ? 1 : factor;
}

// Checks nothing, as a device cannot. A step that is skipped advances nothing.
SCHEDULEFREE_HOST_DEVICE inline ScheduleStep schedule_step_unchecked(const ScheduleState& state,
                                                                     double scheduled_lr,
                                                                     const StepRule& rule,
                                                                     const StepInputs& inputs) {
  ScheduleStep result;
  result.next = state;
  result.scheduled_lr = scheduled_lr;
  StepCoefficients& coefs = result.coefs;
  coefs.k = static_cast<double>(state.k);
  coefs.weight_sum = state.weight_sum;
  coefs.lr_max = state.lr_max;
  coefs.scheduled_lr = scheduled_lr;
  coefs.beta = rule.beta_next;
  coefs.stochastic = rule.stochastic ? 1 : 0;
  if (inputs.found_inf != 0) return result;

  const StepFactors factors = step_factors(rule.kind, state.k, rule.adam);
  const double step = static_cast<double>(state.k + 1);
  const double warmup = static_cast<double>(state.k) < rule.warmup_steps ? step / rule.warmup_steps : 1.0;
  const double lr = inputs.lr * warmup * factors.lr_factor * rule.lr_factor;
  const double lr_max = lr < state.lr_max ? state.lr_max : lr;
  const double weight = std::pow(step, rule.r) * std::pow(lr_max, rule.weight_lr_power);
  result.scheduled_lr = lr;
  result.next = {state.k + 1, state.weight_sum, lr_max};
  if (state.k < rule.c_warmup) {
    result.c = 1;
  } else {
    result.next.weight_sum += weight;
    result.c = result.next.weight_sum == 0 ? 0.0 : weight / result.next.weight_sum;
    if (rule.decoupling_c > 0) {  // Song et al., "Through the River", arXiv 2507.09846
      const double c = result.c * (1 - rule.beta_next) * rule.decoupling_c;
      result.c = c > 1 ? 1 : c;
    }
    // Generalized Primal Averaging, Defazio et al., arXiv 2512.17131: mu_x is 1 - c, mu_y is beta.
    if (rule.averaging_weight > 0) result.c = rule.averaging_weight;
  }

  const double ratio = rule.beta_next / rule.beta;
  const double clip =
      rule.clips ? clip_factor(inputs.grad_norm / inputs.grad_scale, rule.max_grad_norm) : 1.0;
  coefs.take = 1;
  coefs.lr = lr;
  // 1 - beta' * (1 - c) / beta, in a form that is exactly c while beta stays.
  coefs.w = (1 - ratio) + ratio * result.c;
  coefs.a = -lr * (1 - rule.beta_next * (1 - result.c));
  // ScheduleFree+ decays by the square of the step size (AdamC, arXiv 2506.02285).
  coefs.weight_decay = rule.kind == StepKind::kPlus ? inputs.weight_decay * lr : inputs.weight_decay;
  coefs.grad_mul = (rule.maximize ? -1.0 : 1.0) * clip / inputs.grad_scale;
  coefs.beta2 = rule.adam.beta2;
  coefs.denom_scale = factors.denom_scale;
  coefs.denom_eps = factors.denom_eps;
  coefs.inner_momentum = rule.adam.inner_momentum;
  return result;
}

}  // namespace detail

// The scalars of the step after `state`, and the state after it.
//
// Throws std::invalid_argument, naming the value and its domain, without any effect.
inline ScheduleStep schedule_step(const ScheduleState& state, double scheduled_lr, const StepRule& rule,
                                  const StepInputs& inputs) {
  detail::require(state.k >= 0, "k", static_cast<double>(state.k), "a number of steps, 0 or more");
  check_hyperparameter("lr", inputs.lr);
  check_hyperparameter("weight_decay", inputs.weight_decay);
  check_hyperparameter("beta", rule.beta);
  check_hyperparameter("beta", rule.beta_next);
  check_numbers(rule);
  const ScheduleStep result = detail::schedule_step_unchecked(state, scheduled_lr, rule, inputs);
  detail::require(std::isfinite(result.next.weight_sum), "weight_sum", result.next.weight_sum,
                  "a finite sum of (k + 1)^r * lr_max^weight_lr_power");
  return result;
}

// ---- ScheduleFree+ -----------------------------------------------------------------------------------

// ScheduleFree+ (arXiv 2605.19095): beta at step k on its way from `beta` to `beta_max`, which 1 - beta goes
// along a straight line of its logarithm.
inline double annealed_beta(std::int64_t k, double beta, double beta_max, std::int64_t anneal_steps) {
  if (anneal_steps <= 0) return beta;
  const double progress = std::min(static_cast<double>(k) / static_cast<double>(anneal_steps), 1.0);
  return 1 - std::exp(std::log(1 - beta) * (1 - progress) + std::log(1 - beta_max) * progress);
}

// ScheduleFree+'s Polyak step size, from sums over all parameters.
struct PolyakStep {
  double lr_factor = 0;         // max(0, f + ip) / ema_corrected
  double grad_l1_ema = 0;       // running mean of sum |g| * sqrt(pi / 2)
  double grad_l1_ema_corr = 0;  // the same, corrected for its start at 0
};

// `grad_l1` is sum |g|, `ip_term` is beta' * sum g * (z - x), where z - x = (z - y) / beta.
//
// Throws std::invalid_argument for sums or a function value that are not finite.
inline PolyakStep polyak_step(std::int64_t k, double function_value, double grad_l1, double ip_term,
                              double polyak_beta, double grad_l1_ema) {
  detail::require(std::isfinite(function_value), "function_value", function_value, "a finite loss");
  detail::require(std::isfinite(grad_l1), "gradients", grad_l1, "a finite sum of absolute values");
  detail::require(std::isfinite(ip_term), "gradients", ip_term, "a finite inner product with z - x");
  constexpr double kHalfPi = 1.57079632679489661923;
  PolyakStep step;
  step.grad_l1_ema = polyak_beta * grad_l1_ema + (1 - polyak_beta) * grad_l1 * std::sqrt(kHalfPi);
  step.grad_l1_ema_corr = step.grad_l1_ema / (1 - std::pow(polyak_beta, static_cast<double>(k + 1)));
  const double gap = std::max(0.0, function_value + ip_term);
  step.lr_factor = step.grad_l1_ema_corr > 0 ? gap / step.grad_l1_ema_corr : 0.0;
  return step;
}

}  // namespace schedulefree
