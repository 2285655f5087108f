// The schedule of Schedule-Free learning: the scalars of one step of a parameter group, in double, and what
// is refused of it.
//
// Plain C++ without torch. The Python facade reaches it through the module `_C`, the C++ facade includes it,
// and schedule_step_ computes it where the parameters are.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <sstream>
#include <stdexcept>

#include "hyperparameters.h"
#include "schedule_math.h"

namespace schedulefree {

inline constexpr const char* kStepKindNames[kStepKinds] = {"sgd", "adamw", "adamw_paper", "radam", "plus"};

inline constexpr const char* kCoefficientNames[] = {
#define SCHEDULEFREE_NAME(name) #name,
    SCHEDULEFREE_COEFFICIENTS(SCHEDULEFREE_NAME)
#undef SCHEDULEFREE_NAME
};

namespace detail {

inline void require(bool ok, const char* name, double value, const char* domain) {
  if (ok) return;
  std::ostringstream message;
  message << "Invalid " << name << ": " << value << ", expected " << domain;
  throw std::invalid_argument(message.str());
}

}  // namespace detail

// The scalars of the step after `state`, and the state after it.
//
// Throws std::invalid_argument, naming the value and its domain, without any effect.
inline ScheduleStep schedule_step(const ScheduleState& state, double scheduled_lr, const StepRule& rule,
                                  const StepInputs& inputs) {
  detail::require(state.k >= 0, "k", static_cast<double>(state.k), kSteps.text);
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
