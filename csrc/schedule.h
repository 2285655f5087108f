// The host schedule of Schedule-Free learning: one call per parameter group and step, in double.
//
// Plain C++ without torch: the Python facade reaches it through the module `_C`, the C++ facade
// includes it. Formulas: Defazio et al., "The Road Less Scheduled", arXiv 2405.15682, section 4.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace schedulefree {

// What a group carries from step to step.
struct ScheduleState {
  std::int64_t k = 0;     // steps taken
  double weight_sum = 0;  // sum of the averaging weights so far
  double lr_max = -1;     // largest learning rate so far; negative before the first step
};

struct ScheduleOptions {
  double lr = 0;
  double lr_factor = 1;  // of this step alone, beside warmup: radam_step(), paper_lr_factor()
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

// The scalars of the step after `state`, and the state after it.
//
// Throws std::invalid_argument, naming the value and its domain, without any effect.
inline ScheduleStep advance(const ScheduleState& state, const ScheduleOptions& options) {
  detail::require(std::isfinite(options.lr) && options.lr >= 0, "lr", options.lr, "a finite value >= 0");
  detail::require(options.beta > 0 && options.beta <= 1, "beta", options.beta,
                  "a value in (0, 1]: at 0, y carries nothing of x");
  detail::require(options.beta_next > 0 && options.beta_next <= 1, "beta", options.beta_next,
                  "a value in (0, 1]: at 0, y carries nothing of x");

  const double step = static_cast<double>(state.k + 1);
  const double warmup =
      state.k < options.warmup_steps ? step / static_cast<double>(options.warmup_steps) : 1.0;

  ScheduleStep result;
  result.lr = options.lr * warmup * options.lr_factor;
  result.next = {state.k + 1, state.weight_sum, std::max(result.lr, state.lr_max)};
  const double weight = std::pow(step, options.r) * std::pow(result.next.lr_max, options.weight_lr_power);
  if (state.k < options.c_warmup) {
    result.c = 1;
  } else {
    result.next.weight_sum += weight;
    detail::require(std::isfinite(result.next.weight_sum), "weight_sum", result.next.weight_sum,
                    "a finite sum of (k + 1)^r * lr_max^weight_lr_power");
    result.c = result.next.weight_sum == 0 ? 0.0 : weight / result.next.weight_sum;
  }

  // 1 - beta' * (1 - c) / beta, in a form that is exactly c while beta stays.
  const double ratio = options.beta_next / options.beta;
  result.w = (1 - ratio) + ratio * result.c;
  result.a = -result.lr * (1 - options.beta_next * (1 - result.c));
  return result;
}

// The Adam denominator denom_scale * sqrt(v) + denom_eps.
struct AdamDenominator {
  double scale = 1;
  double eps = 0;
};

// (1 - beta1^t) * (sqrt(v / (1 - beta2^t)) + eps) with t = k + 1 and beta1 the inner momentum: both bias
// corrections of Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) in two scalars.
inline AdamDenominator adam_denominator(std::int64_t k, double beta2, double inner_momentum, double eps) {
  const double t = static_cast<double>(k + 1);
  const double correction1 = 1 - std::pow(inner_momentum, t);
  const double correction2 = 1 - std::pow(beta2, t);
  return {correction1 / std::sqrt(correction2), correction1 * eps};
}

// RAdam's choice for one step (Liu et al., arXiv 1908.03265, algorithm 2).
struct RadamStep {
  double lr_factor = 1;
  bool adaptive = true;  // false: u is the gradient, while its variance cannot be estimated yet
};

// A silent SGD phase takes no step while the variance cannot be estimated, else it takes SGD steps.
inline RadamStep radam_step(std::int64_t k, double beta2, bool silent_sgd_phase) {
  const double t = static_cast<double>(k + 1);
  const double beta2_t = std::pow(beta2, t);
  const double rho_inf = 2 / (1 - beta2) - 1;
  const double rho = rho_inf - 2 * t * beta2_t / (1 - beta2_t);
  if (!(rho > 4)) return {silent_sgd_phase ? 0.0 : 1.0, false};
  return {std::sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)), true};
}

// The paper's AdamW corrects the learning rate for the bias of v, where Adam corrects v.
inline double paper_lr_factor(std::int64_t k, double beta2) {
  return std::sqrt(1 - std::pow(beta2, static_cast<double>(k + 1)));
}

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
