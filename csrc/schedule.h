// The schedule of Schedule-Free learning: one call per parameter group and step, in double.
//
// Plain C++ without torch: the Python facade reaches it through the module `_C`, the C++ facade
// includes it, and schedule_step_ computes it where the parameters are. Formulas: Defazio et al., "The Road
// Less Scheduled", arXiv 2405.15682, section 4. What a device may call is marked SCHEDULEFREE_HOST_DEVICE; it
// throws nothing.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>

#if defined(__CUDACC__)
#define SCHEDULEFREE_HOST_DEVICE __host__ __device__
#else
#define SCHEDULEFREE_HOST_DEVICE
#endif

namespace schedulefree {

// What a group carries from step to step.
struct ScheduleState {
  std::int64_t k = 0;     // steps taken
  double weight_sum = 0;  // sum of the averaging weights so far
  double lr_max = -1;     // largest learning rate so far; negative before the first step
};

struct ScheduleOptions {
  double lr = 0;
  double lr_factor = 1;  // of this step alone, beside warmup
  std::int64_t warmup_steps = 0;
  std::int64_t c_warmup = 0;  // steps during which x follows z: c is 1 and no averaging weight is counted
  double r = 0;
  double weight_lr_power = 2;
  double beta = 0.9;       // interpolation weight that built the current y
  double beta_next = 0.9;  // the one for the next y
};

struct ScheduleStep {
  double lr = 0;  // after warmup and factor: the step size of z
  double c = 0;   // weight of the new z in the average x
  double w = 0;   // y' = y + w * (z - y) + a * u
  double a = 0;
  ScheduleState next;
};

namespace detail {

inline void require(bool ok, const char* name, double value, const char* domain) {
  if (ok) return;
  std::ostringstream message;
  message << "Invalid " << name << ": " << value << ", expected " << domain;
  throw std::invalid_argument(message.str());
}

}  // namespace detail

// Weight of z that turns y into x, and x into y (y = beta * x + (1 - beta) * z).
inline double y_to_x_weight(double beta) {
  detail::require(beta > 0 && beta <= 1, "beta", beta, "a value in (0, 1]: at 0, y carries nothing of x");
  return (beta - 1) / beta;  // as 1 - 1 / beta, with one rounding
}

inline double x_to_y_weight(double beta) {
  detail::require(beta > 0 && beta <= 1, "beta", beta, "a value in (0, 1]: at 0, y carries nothing of x");
  return 1 - beta;
}

namespace detail {

// The scalars of the step after `state`, and the state after it, for options inside their domain.
SCHEDULEFREE_HOST_DEVICE inline ScheduleStep advance_unchecked(const ScheduleState& state,
                                                               const ScheduleOptions& options) {
  const double step = static_cast<double>(state.k + 1);
  const double warmup =
      state.k < options.warmup_steps ? step / static_cast<double>(options.warmup_steps) : 1.0;

  ScheduleStep result;
  result.lr = options.lr * warmup * options.lr_factor;
  result.next = {state.k + 1, state.weight_sum, result.lr < state.lr_max ? state.lr_max : result.lr};
  const double weight = std::pow(step, options.r) * std::pow(result.next.lr_max, options.weight_lr_power);
  if (state.k < options.c_warmup) {
    result.c = 1;
  } else {
    result.next.weight_sum += weight;
    result.c = result.next.weight_sum == 0 ? 0.0 : weight / result.next.weight_sum;
  }

  // 1 - beta' * (1 - c) / beta, in a form that is exactly c while beta stays.
  const double ratio = options.beta_next / options.beta;
  result.w = (1 - ratio) + ratio * result.c;
  result.a = -result.lr * (1 - options.beta_next * (1 - result.c));
  return result;
}

}  // namespace detail

// The scalars of the step after `state`, and the state after it.
//
// Throws std::invalid_argument, naming the value and its domain, without any effect.
inline ScheduleStep advance(const ScheduleState& state, const ScheduleOptions& options) {
  detail::require(std::isfinite(options.lr) && options.lr >= 0, "lr", options.lr, "a finite value >= 0");
  detail::require(options.beta > 0 && options.beta <= 1, "beta", options.beta,
                  "a value in (0, 1]: at 0, y carries nothing of x");
  detail::require(options.beta_next > 0 && options.beta_next <= 1, "beta", options.beta_next,
                  "a value in (0, 1]: at 0, y carries nothing of x");
  const ScheduleStep result = detail::advance_unchecked(state, options);
  detail::require(std::isfinite(result.next.weight_sum), "weight_sum", result.next.weight_sum,
                  "a finite sum of (k + 1)^r * lr_max^weight_lr_power");
  return result;
}

// ---- what the optimizers differ in -------------------------------------------------------------------

// The values are those of schedule_step_'s `kind`.
enum class StepKind : std::int8_t { kSgd = 0, kAdamW = 1, kAdamWPaper = 2, kRAdam = 3 };

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
      return detail::adam_factors(k, adam);
    case StepKind::kAdamWPaper:
      // Corrects the learning rate for the bias of v, where Adam corrects v.
      return {std::sqrt(detail::one_minus_power(adam.beta2, static_cast<double>(k + 1))), 1, adam.eps};
    case StepKind::kRAdam:
      return detail::radam_factors(k, adam);
  }
  return {};
}

// Factor on gradients of this norm, as torch.nn.utils.clip_grad_norm_ has it. An infinite limit only
// measures.
SCHEDULEFREE_HOST_DEVICE inline double clip_factor(double norm, double max_norm) {
  if (max_norm > DBL_MAX) return 1;
  const double factor = max_norm / (norm + 1e-6);
  return factor > 1 ? 1 : factor;
}

// ---- the schedule of schedule_step_, whose state is in tensors ---------------------------------------

// The layout of a `coefs` tensor: all that the step operators take from it.
struct StepCoefficients {
  double take = 0;  // 0: the step is skipped, and kernels return at once
  double lr = 0, w = 0, a = 0, weight_decay = 0, grad_mul = 1;
  double beta2 = 0, denom_scale = 1, denom_eps = 0, inner_momentum = 0;
  // What the schedule's tensors held before, for a caller whose step operator was refused.
  double k = 0, weight_sum = 0, lr_max = 0, scheduled_lr = 0, beta = 0;
};

constexpr std::int64_t kStepCoefficients = sizeof(StepCoefficients) / sizeof(double);

// A group's schedule as its tensors hold it.
struct GroupSchedule {
  ScheduleState state;
  double scheduled_lr = 0;  // of the last step
  double beta = 0.9;        // built the current y
};

// What a host says of a step.
struct StepRule {
  StepKind kind = StepKind::kSgd;
  AdamOptions adam;
  double beta_next = 0.9;
  std::int64_t warmup_steps = 0;
  double r = 0;
  double weight_lr_power = 2;
  bool maximize = false;
  bool clips = false;
  double max_grad_norm = 0;
};

// What a step reads where the parameters are.
struct StepInputs {
  double lr = 0;
  double weight_decay = 0;
  double grad_norm = 0;   // of the gradients as they are, scaled by grad_scale
  double grad_scale = 1;  // gradients are this many times what they should be
  double found_inf = 0;   // anything but 0 skips the step
};

SCHEDULEFREE_HOST_DEVICE inline ScheduleOptions schedule_options(const GroupSchedule& schedule,
                                                                 const StepRule& rule,
                                                                 const StepInputs& inputs) {
  ScheduleOptions options;
  options.lr = inputs.lr;
  options.lr_factor = step_factors(rule.kind, schedule.state.k, rule.adam).lr_factor;
  options.warmup_steps = rule.warmup_steps;
  options.r = rule.r;
  options.weight_lr_power = rule.weight_lr_power;
  options.beta = schedule.beta;
  options.beta_next = rule.beta_next;
  return options;
}

// Advances `schedule` by a step and returns its coefficients. A step that is skipped advances nothing.
//
// Checks nothing, as a device cannot: advance(schedule.state, schedule_options(...)) throws what there is to
// refuse.
SCHEDULEFREE_HOST_DEVICE inline StepCoefficients take_schedule_step(GroupSchedule& schedule,
                                                                    const StepRule& rule,
                                                                    const StepInputs& inputs) {
  StepCoefficients coefs;
  coefs.k = static_cast<double>(schedule.state.k);
  coefs.weight_sum = schedule.state.weight_sum;
  coefs.lr_max = schedule.state.lr_max;
  coefs.scheduled_lr = schedule.scheduled_lr;
  coefs.beta = schedule.beta;
  if (inputs.found_inf != 0) return coefs;

  const ScheduleStep step =
      detail::advance_unchecked(schedule.state, schedule_options(schedule, rule, inputs));
  const StepFactors factors = step_factors(rule.kind, schedule.state.k, rule.adam);
  const double clip =
      rule.clips ? clip_factor(inputs.grad_norm / inputs.grad_scale, rule.max_grad_norm) : 1.0;
  coefs.take = 1;
  coefs.lr = step.lr;
  coefs.w = step.w;
  coefs.a = step.a;
  coefs.weight_decay = inputs.weight_decay;
  coefs.grad_mul = (rule.maximize ? -1.0 : 1.0) * clip / inputs.grad_scale;
  coefs.beta2 = rule.adam.beta2;
  coefs.denom_scale = factors.denom_scale;
  coefs.denom_eps = factors.denom_eps;
  coefs.inner_momentum = rule.adam.inner_momentum;
  schedule = {step.next, step.lr, rule.beta_next};
  return coefs;
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
