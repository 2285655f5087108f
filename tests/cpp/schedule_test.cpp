#include "schedule.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

namespace schedulefree {
namespace {

ScheduleOptions options(double lr) {
  ScheduleOptions o;
  o.lr = lr;
  return o;
}

std::string message_of(const ScheduleOptions& o) {
  try {
    advance({}, o);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(Advance, FirstStepMovesTheAverageToZ) {
  const ScheduleStep s = advance({}, options(0.1));
  EXPECT_EQ(s.lr, 0.1);
  EXPECT_EQ(s.c, 1.0);
  EXPECT_EQ(s.w, 1.0);
  EXPECT_EQ(s.a, -0.1);
  EXPECT_EQ(s.next.k, 1);
  EXPECT_EQ(s.next.lr_max, 0.1);
  EXPECT_EQ(s.next.weight_sum, std::pow(0.1, 2.0));
}

TEST(Advance, ConstantLearningRateAveragesUniformly) {
  ScheduleState state;
  for (int k = 0; k < 100; ++k) {
    const ScheduleStep s = advance(state, options(0.5));
    EXPECT_NEAR(s.c, 1.0 / (k + 1), 1e-15);
    EXPECT_EQ(s.w, s.c);  // exactly, while beta stays
    EXPECT_NEAR(s.a, 0.5 * (0.9 * (1 - s.c) - 1), 1e-15);
    state = s.next;
  }
}

TEST(Advance, WarmupIsLinearAndEnds) {
  ScheduleOptions o = options(2.0);
  o.warmup_steps = 4;
  ScheduleState state;
  for (const double expected : {0.5, 1.0, 1.5, 2.0, 2.0}) {
    const ScheduleStep s = advance(state, o);
    EXPECT_EQ(s.lr, expected);
    state = s.next;
  }
}

TEST(Advance, LargestLearningRateIsKept) {
  const ScheduleStep s = advance({3, 0.5, 0.7}, options(0.1));
  EXPECT_EQ(s.next.lr_max, 0.7);
  EXPECT_EQ(s.next.weight_sum, 0.5 + std::pow(0.7, 2.0));
}

TEST(Advance, WeightsGrowWithR) {
  ScheduleOptions o = options(1.0);
  o.r = 3;
  const ScheduleStep s = advance({4, 100, 1.0}, o);
  EXPECT_EQ(s.next.weight_sum, 225.0);
  EXPECT_EQ(s.c, 125.0 / 225.0);
}

TEST(Advance, ZeroLearningRateGivesNoWeight) {
  const ScheduleStep s = advance({}, options(0.0));
  EXPECT_EQ(s.c, 0.0);
  EXPECT_EQ(s.w, 0.0);
  EXPECT_EQ(s.a, 0.0);
  EXPECT_EQ(s.next.weight_sum, 0.0);
  EXPECT_EQ(s.next.lr_max, 0.0);
}

TEST(Advance, AMovedBetaKeepsTheAverage) {
  // y = b x + (1 - b) z for any x, z; after the step y' must be b' x' + (1 - b') z'.
  ScheduleOptions o = options(0.1);
  o.beta = 0.9;
  o.beta_next = 0.7;
  const ScheduleStep s = advance({5, 0.03, 0.1}, o);
  const double x = 1.25, z = -0.5, u = 0.3;
  const double y = o.beta * x + (1 - o.beta) * z;
  const double z_next = z - s.lr * u;
  const double x_next = (1 - s.c) * x + s.c * z_next;
  EXPECT_NEAR(y + s.w * (z - y) + s.a * u, o.beta_next * x_next + (1 - o.beta_next) * z_next, 1e-15);
}

TEST(Advance, AWarmupOfTheAverageFollowsZAndCountsNoWeight) {
  ScheduleOptions o = options(0.5);
  o.c_warmup = 3;
  ScheduleState state;
  for (int k = 0; k < 6; ++k) {
    const ScheduleStep s = advance(state, o);
    EXPECT_NEAR(s.c, k < 3 ? 1.0 : 1.0 / (k - 2), 1e-15) << k;
    EXPECT_NEAR(s.next.weight_sum, k < 3 ? 0.0 : 0.25 * (k - 2), 1e-15) << k;
    EXPECT_EQ(s.next.k, k + 1);
    state = s.next;
  }
  o.beta_next = 0.95;  // y' is z' whatever the betas
  EXPECT_EQ(advance({}, o).w, 1.0);
  EXPECT_EQ(advance({}, o).a, -0.5);
}

TEST(Advance, RefusesValuesOutsideTheirDomain) {
  EXPECT_NE(message_of(options(-1)).find("Invalid lr: -1, expected a finite value >= 0"), std::string::npos);
  EXPECT_NE(message_of(options(std::numeric_limits<double>::infinity())), "");
  EXPECT_NE(message_of(options(std::nan(""))), "");
  for (const double beta : {0.0, -0.1, 1.1, std::nan("")}) {
    ScheduleOptions o = options(0.1);
    o.beta_next = beta;
    EXPECT_NE(message_of(o).find("(0, 1]"), std::string::npos) << beta;
  }
  ScheduleOptions o = options(1e200);
  EXPECT_NE(message_of(o).find("weight_sum"), std::string::npos);
}

TEST(Swap, WeightsUndoEachOther) {
  for (const double beta : {1.0, 0.9, 0.5, 0.1}) {
    const double z = 2.0, x = -3.0;
    const double y = x + x_to_y_weight(beta) * (z - x);
    EXPECT_NEAR(y, beta * x + (1 - beta) * z, 1e-15);
    EXPECT_NEAR(y + y_to_x_weight(beta) * (z - y), x, 1e-13);
  }
  EXPECT_THROW(y_to_x_weight(0), std::invalid_argument);
  EXPECT_THROW(x_to_y_weight(1.5), std::invalid_argument);
}

TEST(Swap, TheWeightOfTheWayToXIsRoundedOnce) {
  // 1 - 1 / beta loses its leading digits: exactly, it is -1/9 of what 0.9 is rounded to.
  EXPECT_EQ(y_to_x_weight(0.5), -1.0);
  const long double exact = (static_cast<long double>(0.9) - 1) / static_cast<long double>(0.9);
  EXPECT_EQ(y_to_x_weight(0.9), static_cast<double>(exact));
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

TEST(TakeScheduleStep, HasTheScalarsOfTheHost) {
  for (const StepKind kind : {StepKind::kSgd, StepKind::kAdamW, StepKind::kAdamWPaper, StepKind::kRAdam}) {
    GroupSchedule schedule = {{}, 0, 0.9};
    schedule.state.lr_max = -1;
    ScheduleState state = schedule.state;
    double beta = 0.9;
    for (std::int64_t k = 0; k < 50; ++k) {
      const StepRule r = rule(kind);
      const StepFactors factors = step_factors(kind, k, r.adam);
      ScheduleOptions o;
      o.lr = 0.3;
      o.lr_factor = factors.lr_factor;
      o.warmup_steps = 3;
      o.r = 0.5;
      o.beta = beta;
      o.beta_next = 0.8;
      const GroupSchedule before = schedule;
      const ScheduleStep s = advance(state, o);
      StepInputs inputs;
      inputs.lr = 0.3;
      inputs.weight_decay = 0.1;
      const StepCoefficients c = take_schedule_step(schedule, r, inputs);
      EXPECT_EQ(c.take, 1.0);
      EXPECT_EQ(c.lr, s.lr);
      EXPECT_EQ(c.w, s.w);
      EXPECT_EQ(c.a, s.a);
      EXPECT_EQ(c.weight_decay, 0.1);
      EXPECT_EQ(c.grad_mul, -1.0);
      EXPECT_EQ(c.beta2, 0.95);
      EXPECT_EQ(c.denom_scale, factors.denom_scale);
      EXPECT_EQ(c.denom_eps, factors.denom_eps);
      EXPECT_EQ(c.inner_momentum, 0.5);
      EXPECT_EQ(c.k, static_cast<double>(before.state.k));
      EXPECT_EQ(c.weight_sum, before.state.weight_sum);
      EXPECT_EQ(c.lr_max, before.state.lr_max);
      EXPECT_EQ(c.scheduled_lr, before.scheduled_lr);
      EXPECT_EQ(c.beta, before.beta);
      EXPECT_EQ(schedule.state.k, s.next.k);
      EXPECT_EQ(schedule.state.weight_sum, s.next.weight_sum);
      EXPECT_EQ(schedule.state.lr_max, s.next.lr_max);
      EXPECT_EQ(schedule.scheduled_lr, s.lr);
      EXPECT_EQ(schedule.beta, 0.8);
      state = s.next;
      beta = 0.8;
    }
  }
}

TEST(TakeScheduleStep, AdvancesNothingWhereGradientsOverflowed) {
  GroupSchedule schedule = {{7, 0.25, 0.5}, 0.4, 0.9};
  StepInputs inputs;
  inputs.lr = 0.3;
  for (const double found : {1.0, std::nan("")}) {
    inputs.found_inf = found;
    const StepCoefficients c = take_schedule_step(schedule, rule(StepKind::kAdamW), inputs);
    EXPECT_EQ(c.take, 0.0);
    EXPECT_EQ(schedule.state.k, 7);
    EXPECT_EQ(schedule.state.weight_sum, 0.25);
    EXPECT_EQ(schedule.state.lr_max, 0.5);
    EXPECT_EQ(schedule.scheduled_lr, 0.4);
    EXPECT_EQ(schedule.beta, 0.9);
    EXPECT_EQ(c.k, 7.0);
  }
}

TEST(TakeScheduleStep, ClipsTheUnscaledGradientAndUnscalesIt) {
  StepRule r = rule(StepKind::kSgd);
  r.clips = true;
  r.max_grad_norm = 2;
  StepInputs inputs;
  inputs.lr = 0.3;
  inputs.grad_scale = 4;
  inputs.grad_norm = 40;
  GroupSchedule schedule;
  EXPECT_EQ(take_schedule_step(schedule, r, inputs).grad_mul, -(2 / (10 + 1e-6)) / 4);
  inputs.grad_norm = 4;
  EXPECT_EQ(take_schedule_step(schedule, r, inputs).grad_mul, -0.25);
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
