#include "schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

namespace schedulefree {
namespace {

StepInputs at_lr(double lr) {
  StepInputs inputs;
  inputs.lr = lr;
  return inputs;
}

ScheduleStep step_of(const ScheduleState& state, double lr, const StepRule& rule = {}) {
  return schedule_step(state, 0, rule, at_lr(lr));
}

template <typename Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(ScheduleStep, FirstStepMovesTheAverageToZ) {
  const ScheduleStep s = step_of({}, 0.1);
  EXPECT_EQ(s.coefs.take, 1.0);
  EXPECT_EQ(s.coefs.lr, 0.1);
  EXPECT_EQ(s.coefs.w, 1.0);
  EXPECT_EQ(s.coefs.a, -0.1);
  EXPECT_EQ(s.coefs.beta, 0.9);
  EXPECT_EQ(s.c, 1.0);
  EXPECT_EQ(s.scheduled_lr, 0.1);
  EXPECT_EQ(s.next.k, 1);
  EXPECT_EQ(s.next.lr_max, 0.1);
  EXPECT_EQ(s.next.weight_sum, std::pow(0.1, 2.0));
}

TEST(ScheduleStep, ConstantLearningRateAveragesUniformly) {
  ScheduleState state;
  for (int k = 0; k < 100; ++k) {
    const ScheduleStep s = step_of(state, 0.5);
    EXPECT_NEAR(s.c, 1.0 / (k + 1), 1e-15);
    EXPECT_EQ(s.coefs.w, s.c);  // exactly, while beta stays
    EXPECT_NEAR(s.coefs.a, 0.5 * (0.9 * (1 - s.c) - 1), 1e-15);
    state = s.next;
  }
}

TEST(ScheduleStep, WarmupIsLinearAndEnds) {
  StepRule rule;
  rule.warmup_steps = 4;
  ScheduleState state;
  for (const double expected : {0.5, 1.0, 1.5, 2.0, 2.0}) {
    const ScheduleStep s = step_of(state, 2.0, rule);
    EXPECT_EQ(s.scheduled_lr, expected);
    EXPECT_EQ(s.coefs.lr, expected);
    state = s.next;
  }
}

TEST(ScheduleStep, LargestLearningRateIsKept) {
  const ScheduleStep s = step_of({3, 0.5, 0.7}, 0.1);
  EXPECT_EQ(s.next.lr_max, 0.7);
  EXPECT_EQ(s.next.weight_sum, 0.5 + std::pow(0.7, 2.0));
}

TEST(ScheduleStep, WeightsGrowWithR) {
  StepRule rule;
  rule.r = 3;
  const ScheduleStep s = step_of({4, 100, 1.0}, 1.0, rule);
  EXPECT_EQ(s.next.weight_sum, 225.0);
  EXPECT_EQ(s.c, 125.0 / 225.0);
}

TEST(ScheduleStep, ZeroLearningRateGivesNoWeight) {
  const ScheduleStep s = step_of({}, 0.0);
  EXPECT_EQ(s.c, 0.0);
  EXPECT_EQ(s.coefs.w, 0.0);
  EXPECT_EQ(s.coefs.a, 0.0);
  EXPECT_EQ(s.next.weight_sum, 0.0);
  EXPECT_EQ(s.next.lr_max, 0.0);
}

TEST(ScheduleStep, AMovedBetaKeepsTheAverage) {
  // y = b x + (1 - b) z for any x, z; after the step y' must be b' x' + (1 - b') z'.
  StepRule rule;
  rule.beta = 0.9;
  rule.beta_next = 0.7;
  const ScheduleStep s = step_of({5, 0.03, 0.1}, 0.1, rule);
  const double x = 1.25, z = -0.5, u = 0.3;
  const double y = rule.beta * x + (1 - rule.beta) * z;
  const double z_next = z - s.coefs.lr * u;
  const double x_next = (1 - s.c) * x + s.c * z_next;
  EXPECT_NEAR(y + s.coefs.w * (z - y) + s.coefs.a * u,
              rule.beta_next * x_next + (1 - rule.beta_next) * z_next, 1e-15);
  EXPECT_EQ(s.coefs.beta, 0.7);
}

TEST(ScheduleStep, AWarmupOfTheAverageFollowsZAndCountsNoWeight) {
  StepRule rule;
  rule.c_warmup = 3;
  ScheduleState state;
  for (int k = 0; k < 6; ++k) {
    const ScheduleStep s = step_of(state, 0.5, rule);
    EXPECT_NEAR(s.c, k < 3 ? 1.0 : 1.0 / (k - 2), 1e-15) << k;
    EXPECT_NEAR(s.next.weight_sum, k < 3 ? 0.0 : 0.25 * (k - 2), 1e-15) << k;
    EXPECT_EQ(s.next.k, k + 1);
    state = s.next;
  }
  rule.beta_next = 0.95;  // y' is z' whatever the betas
  EXPECT_EQ(step_of({}, 0.5, rule).coefs.w, 1.0);
  EXPECT_EQ(step_of({}, 0.5, rule).coefs.a, -0.5);
}

TEST(ScheduleStep, ADecoupledAverageWeighsZByOneMinusBeta) {
  for (const double beta : {0.75, 0.875}) {
    StepRule rule;
    rule.beta = rule.beta_next = beta;
    rule.decoupling_c = 24;
    ScheduleState state;
    for (int k = 0; k < 9; ++k) {
      const ScheduleStep s = step_of(state, 0.5, rule);
      EXPECT_NEAR(s.c, std::min(1.0, 24 * (1 - beta) / (k + 1)), 1e-15) << k;
      EXPECT_EQ(s.coefs.w, s.c);
      EXPECT_EQ(s.next.weight_sum, 0.25 * (k + 1));
      state = s.next;
    }
  }
}

TEST(ScheduleStep, AConstantAveragingWeightReplacesWhatTheOthersMakeOfIt) {
  StepRule rule;
  rule.averaging_weight = 0.125;
  rule.decoupling_c = 3;
  rule.r = 1;
  ScheduleState state;
  for (int k = 0; k < 5; ++k) {
    const ScheduleStep s = step_of(state, 0.5, rule);
    EXPECT_EQ(s.c, 0.125);
    EXPECT_EQ(s.coefs.w, 0.125);
    state = s.next;
  }
  EXPECT_EQ(state.weight_sum, 0.25 * (1 + 2 + 3 + 4 + 5));
}

TEST(ScheduleStep, ScheduleFreePlusDecaysByTheSquareOfTheStepSize) {
  StepInputs inputs = at_lr(0.5);
  inputs.weight_decay = 0.1;
  StepRule rule;
  rule.adam = {0.99, 1e-8, 0.9, true};
  rule.lr_factor = 0.5;
  rule.kind = StepKind::kPlus;
  EXPECT_EQ(schedule_step({}, 0, rule, inputs).coefs.weight_decay, 0.1 * 0.25);
  rule.kind = StepKind::kAdamW;
  EXPECT_EQ(schedule_step({}, 0, rule, inputs).coefs.weight_decay, 0.1);
}

TEST(ScheduleStep, RefusesValuesOutsideTheirDomain) {
  const auto message_of_lr = [](double lr) { return message_of([=] { step_of({}, lr); }); };
  EXPECT_EQ(message_of_lr(-1), "Invalid lr: -1, expected a finite value >= 0");
  EXPECT_NE(message_of_lr(std::numeric_limits<double>::infinity()), "");
  EXPECT_NE(message_of_lr(std::nan("")), "");
  EXPECT_NE(message_of_lr(1e200).find("weight_sum"), std::string::npos);
  EXPECT_EQ(message_of([] { step_of({-3, 0, 0}, 0.1); }),
            "Invalid k: -3, expected a number of steps, 0 or more");
  for (const double beta : {0.0, -0.1, 1.1, std::nan("")}) {
    StepRule rule;
    rule.beta_next = beta;
    EXPECT_NE(message_of([&] { step_of({}, 0.1, rule); }).find("(0, 1]"), std::string::npos) << beta;
  }
}

TEST(Coefficients, AreNamedInTheOrderOfTheStruct) {
  StepCoefficients coefs;
  coefs.take = 1;
  coefs.beta = 2;
  coefs.scheduled_lr = 3;
  const double* const values = &coefs.take;
  double found = 0;
  for (std::int64_t i = 0; i < kStepCoefficients; ++i) {
    const std::string name = kCoefficientNames[i];
    EXPECT_EQ(values[i], name == "take" ? 1 : name == "beta" ? 2 : name == "scheduled_lr" ? 3 : 0) << name;
    found += values[i];
  }
  EXPECT_EQ(found, 6);
}

TEST(Hyperparameters, AreCheckedByName) {
  EXPECT_EQ(message_of([] { check_hyperparameter("betas[1]", 1.0, " in parameter group 2"); }),
            "Invalid betas[1] in parameter group 2: 1, expected a value in [0, 1)");
  EXPECT_EQ(
      message_of([] { check_hyperparameter("max_grad_norm", std::numeric_limits<double>::infinity()); }), "");
  for (const NamedDomain& known : kDomains) EXPECT_FALSE(known.domain.holds(std::nan(""))) << known.name;
  EXPECT_THROW(check_hyperparameter("learning_rate", 0.1), std::logic_error);
}

TEST(Swap, WeightsUndoEachOther) {
  for (const double beta : {1.0, 0.9, 0.5, 0.1}) {
    const double z = 2.0, x = -3.0;
    const double y = x + x_to_y_weight(beta).hi * (z - x);
    EXPECT_NEAR(y, beta * x + (1 - beta) * z, 1e-15);
    EXPECT_NEAR(y + y_to_x_weight(beta).hi * (z - y), x, 1e-13);
  }
}

TEST(Swap, TheWeightOfTheWayToXIsRoundedOnce) {
  // 1 - 1 / beta loses its leading digits: exactly, it is -1/9 of what 0.9 is rounded to.
  EXPECT_EQ(y_to_x_weight(0.5).hi, -1.0);
  const long double exact = (static_cast<long double>(0.9) - 1) / static_cast<long double>(0.9);
  EXPECT_EQ(y_to_x_weight(0.9).hi, static_cast<double>(exact));
}

AdamOptions adam(double beta2, double inner_momentum = 0, double eps = 1e-8, bool silent = true) {
  return {beta2, eps, inner_momentum, silent};
}

TEST(StepFactors, OfSgdScaleNothing) {
  const StepFactors f = step_factors(StepKind::kSgd, 3, adam(0.9));
  EXPECT_EQ(f.lr_factor, 1.0);
  EXPECT_EQ(f.denom_scale, 1.0);
  EXPECT_EQ(f.denom_eps, 0.0);
}

TEST(StepFactors, OfAdamHoldBothBiasCorrections) {
  const double v = 0.04, eps = 1e-3;
  const StepFactors f = step_factors(StepKind::kAdamW, 9, adam(0.99, 0.9, eps));
  const double expected = (1 - std::pow(0.9, 10)) * (std::sqrt(v / (1 - std::pow(0.99, 10))) + eps);
  EXPECT_EQ(f.lr_factor, 1.0);
  EXPECT_NEAR(f.denom_scale * std::sqrt(v) + f.denom_eps, expected, 1e-15);
}

TEST(StepFactors, OfAdamWithoutInnerMomentumOnlyCorrectV) {
  const StepFactors f = step_factors(StepKind::kAdamW, 0, adam(0.75));
  EXPECT_DOUBLE_EQ(f.denom_scale, 2.0);
  EXPECT_EQ(f.denom_eps, 1e-8);
}

TEST(StepFactors, OfRAdamAreSilentUntilTheVarianceCanBeEstimated) {
  for (std::int64_t k = 0; k < 4; ++k) {
    const StepFactors f = step_factors(StepKind::kRAdam, k, adam(0.999));
    EXPECT_EQ(f.lr_factor, 0.0) << k;
    EXPECT_EQ(f.denom_scale, 0.0);
    EXPECT_EQ(f.denom_eps, 1.0);
    EXPECT_EQ(step_factors(StepKind::kRAdam, k, adam(0.999, 0, 1e-8, false)).lr_factor, 1.0);
  }
  double last = 0;
  for (std::int64_t k = 4; k < 2000; ++k) {
    const StepFactors f = step_factors(StepKind::kRAdam, k, adam(0.999));
    EXPECT_EQ(f.denom_scale, step_factors(StepKind::kAdamW, k, adam(0.999)).denom_scale);
    EXPECT_GT(f.lr_factor, last);
    EXPECT_LT(f.lr_factor, 1.0);
    last = f.lr_factor;
  }
}

TEST(StepFactors, OfRAdamWithAShortMemoryAreNeverAdaptive) {
  for (const std::int64_t k : {0, 10, 100'000})
    EXPECT_EQ(step_factors(StepKind::kRAdam, k, adam(0.5)).denom_scale, 0.0);
}

TEST(StepFactors, OfThePapersAdamWStartSmallAndEndAtOne) {
  EXPECT_DOUBLE_EQ(step_factors(StepKind::kAdamWPaper, 0, adam(0.99)).lr_factor, 0.1);
  const StepFactors f = step_factors(StepKind::kAdamWPaper, 10'000, adam(0.99));
  EXPECT_NEAR(f.lr_factor, 1.0, 1e-15);
  EXPECT_EQ(f.denom_scale, 1.0);
  EXPECT_EQ(f.denom_eps, 1e-8);
}

TEST(ClipFactor, IsThatOfTorch) {
  using detail::clip_factor;
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::nan("");
  EXPECT_EQ(clip_factor(2.0, 1.0), 1.0 / (2.0 + 1e-6));
  EXPECT_EQ(clip_factor(0.5, 1.0), 1.0);
  EXPECT_EQ(clip_factor(0.0, 1.0), 1.0);
  EXPECT_EQ(clip_factor(infinity, 1.0), 0.0);
  EXPECT_TRUE(std::isnan(clip_factor(nan, 1.0)));
  EXPECT_EQ(clip_factor(infinity, infinity), 1.0);
  EXPECT_EQ(clip_factor(1e300, std::numeric_limits<double>::max()), 1.0);
}

StepRule rule(StepKind kind) {
  StepRule r;
  r.kind = kind;
  r.adam = adam(0.95, 0.5);
  r.beta_next = 0.8;
  r.warmup_steps = 3;
  r.r = 0.5;
  r.maximize = true;
  return r;
}

TEST(ScheduleStep, CarriesTheScalarsOfItsKindAndTheScheduleBefore) {
  for (const StepKind kind : {StepKind::kSgd, StepKind::kAdamW, StepKind::kAdamWPaper, StepKind::kRAdam}) {
    ScheduleState state;
    double scheduled_lr = 0;
    for (std::int64_t k = 0; k < 50; ++k) {
      const StepRule r = rule(kind);
      const StepFactors factors = step_factors(kind, k, r.adam);
      StepInputs inputs = at_lr(0.3);
      inputs.weight_decay = 0.1;
      const ScheduleStep s = schedule_step(state, scheduled_lr, r, inputs);
      const StepCoefficients& c = s.coefs;
      EXPECT_EQ(c.lr, 0.3 * (k < 3 ? static_cast<double>(k + 1) / 3 : 1) * factors.lr_factor);
      EXPECT_EQ(c.weight_decay, 0.1);
      EXPECT_EQ(c.grad_mul, -1.0);
      EXPECT_EQ(c.beta2, 0.95);
      EXPECT_EQ(c.denom_scale, factors.denom_scale);
      EXPECT_EQ(c.denom_eps, factors.denom_eps);
      EXPECT_EQ(c.inner_momentum, 0.5);
      EXPECT_EQ(c.beta, 0.8);
      EXPECT_EQ(c.k, static_cast<double>(state.k));
      EXPECT_EQ(c.weight_sum, state.weight_sum);
      EXPECT_EQ(c.lr_max, state.lr_max);
      EXPECT_EQ(c.scheduled_lr, scheduled_lr);
      state = s.next;
      scheduled_lr = s.scheduled_lr;
    }
  }
}

TEST(ScheduleStep, AdvancesNothingWhereGradientsOverflowed) {
  StepInputs inputs = at_lr(0.3);
  for (const double found : {1.0, std::nan("")}) {
    inputs.found_inf = found;
    const ScheduleStep s = schedule_step({7, 0.25, 0.5}, 0.4, rule(StepKind::kAdamW), inputs);
    EXPECT_EQ(s.coefs.take, 0.0);
    EXPECT_EQ(s.coefs.k, 7.0);
    EXPECT_EQ(s.next.k, 7);
    EXPECT_EQ(s.next.weight_sum, 0.25);
    EXPECT_EQ(s.next.lr_max, 0.5);
    EXPECT_EQ(s.scheduled_lr, 0.4);
  }
}

TEST(ScheduleStep, ClipsTheUnscaledGradientAndUnscalesIt) {
  StepRule r = rule(StepKind::kSgd);
  r.clips = true;
  r.max_grad_norm = 2;
  StepInputs inputs = at_lr(0.3);
  inputs.grad_scale = 4;
  inputs.grad_norm = 40;
  EXPECT_EQ(schedule_step({}, 0, r, inputs).coefs.grad_mul, -(2 / (10 + 1e-6)) / 4);
  inputs.grad_norm = 4;
  EXPECT_EQ(schedule_step({}, 0, r, inputs).coefs.grad_mul, -0.25);
}

TEST(AnnealedBeta, GoesAlongTheLogarithmOfOneMinusBeta) {
  EXPECT_EQ(annealed_beta(7, 0.9, 0.99, 0), 0.9);
  EXPECT_DOUBLE_EQ(annealed_beta(0, 0.9, 0.99, 10), 0.9);
  EXPECT_NEAR(annealed_beta(5, 0.9, 0.99, 10), 1 - std::sqrt(0.1 * 0.01), 1e-15);
  EXPECT_DOUBLE_EQ(annealed_beta(10, 0.9, 0.99, 10), 0.99);
  EXPECT_DOUBLE_EQ(annealed_beta(1000, 0.9, 0.99, 10), 0.99);
}

TEST(PolyakStep, IsTheGapOverTheGradient) {
  const double pi = std::acos(-1.0);
  const PolyakStep s = polyak_step(0, 3.0, 2.0, -1.0, 0.0, 0.0);
  EXPECT_DOUBLE_EQ(s.grad_l1_ema, 2.0 * std::sqrt(pi / 2));
  EXPECT_DOUBLE_EQ(s.lr_factor, 2.0 / (2.0 * std::sqrt(pi / 2)));
  EXPECT_EQ(polyak_step(0, 1.0, 2.0, -1.5, 0.0, 0.0).lr_factor, 0.0);
  EXPECT_EQ(polyak_step(0, 1.0, 0.0, 0.0, 0.0, 0.0).lr_factor, 0.0);
}

TEST(PolyakStep, TheRunningMeanIsCorrectedForItsStart) {
  const double unit = std::sqrt(std::acos(-1.0) / 2);
  double ema = 0;
  for (int k = 0; k < 5; ++k) {
    const PolyakStep s = polyak_step(k, 1.0, 4.0, 0.0, 0.9, ema);
    EXPECT_NEAR(s.grad_l1_ema_corr, 4.0 * unit, 1e-14);
    EXPECT_NEAR(s.grad_l1_ema, 4.0 * unit * (1 - std::pow(0.9, k + 1)), 1e-14);
    ema = s.grad_l1_ema;
  }
}

TEST(PolyakStep, RefusesWhatIsNotFinite) {
  const double nan = std::nan("");
  EXPECT_THROW(polyak_step(0, nan, 1, 0, 0, 0), std::invalid_argument);
  EXPECT_THROW(polyak_step(0, 1, nan, 0, 0, 0), std::invalid_argument);
  EXPECT_THROW(polyak_step(0, 1, 1, std::numeric_limits<double>::infinity(), 0, 0), std::invalid_argument);
}

}  // namespace
}  // namespace schedulefree
