#include "update_math.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

namespace schedulefree {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Any bit pattern, so that subnormals, infinities and huge ratios all occur.
float any_float(std::mt19937& random) { return bit_cast<float>(static_cast<std::uint32_t>(random())); }

TEST(FmaOnce, RoundsOnce) {
  std::mt19937 random(1);
  for (int i = 0; i < 2'000'000; ++i) {
    const float a = any_float(random), b = any_float(random);
    // Half of the addends are close to -a * b, where cancellation shows a second rounding.
    const float c = i % 2 ? any_float(random) : -a * b * (1 + static_cast<float>(random() % 8) * 1e-7f);
    const float expected = std::fma(a, b, c), got = fma_once(a, b, c);
    ASSERT_TRUE(bit_cast<std::uint32_t>(got) == bit_cast<std::uint32_t>(expected) ||
                (std::isnan(got) && std::isnan(expected)))
        << a << " * " << b << " + " << c << ": " << got << ", expected " << expected;
  }
}

TEST(FmaOnce, RoundsTiesOfTheExactValue) {
  // The sum lies 2^-90 from a tie between two floats: rounding to double first would lose which side.
  const float c = 1.0f + std::ldexp(1.0f, -23);
  for (const float sign : {1.0f, -1.0f}) {
    const float a = std::ldexp(1.0f, -24) * (1 + sign * std::ldexp(1.0f, -23));
    EXPECT_EQ(fma_once(a, 1.0f, c), std::fma(a, 1.0f, c));
    const float tiny = sign * std::ldexp(1.0f, -90);
    EXPECT_EQ(fma_once(1.0f + std::ldexp(1.0f, -12), 1.0f + std::ldexp(1.0f, -12), tiny),
              std::fma(1.0f + std::ldexp(1.0f, -12), 1.0f + std::ldexp(1.0f, -12), tiny));
  }
}

TEST(Interpolate, ReachesBothEndsExactly) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (int i = 0; i < 1000; ++i) {
    const float p = normal(random), q = 1e6f * normal(random);
    EXPECT_EQ(interpolate(p, q, Interpolation<float>(0.0)), p);
    EXPECT_EQ(interpolate(p, q, Interpolation<float>(1.0)), q);
  }
}

TEST(Interpolate, ExtrapolatesWithNegativeWeights) {
  EXPECT_DOUBLE_EQ(interpolate(2.0, 3.0, Interpolation<double>(1 - 1 / 0.9)), 2.0 + (1 - 1 / 0.9));
}

TEST(SplitFloat, IsExactBothWays) {
  std::mt19937 random(3);
  for (int i = 0; i < 1'000'000; ++i) {
    const float x = any_float(random);
    std::uint16_t hi = 0;
    std::int16_t lo = 0;
    split_float(x, hi, lo);
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(join_float(hi, lo)));
      ASSERT_TRUE(std::isnan(bf16_to_float(hi)));
    } else {
      ASSERT_EQ(bit_cast<std::uint32_t>(join_float(hi, lo)), bit_cast<std::uint32_t>(x));
      // The high half is a nearest bf16.
      const float half_ulp = std::ldexp(std::fabs(x), -8);
      if (std::fabs(x) < 3e38f && std::fabs(x) > 1e-30f) {
        ASSERT_LE(std::fabs(bf16_to_float(hi) - x), half_ulp);
      }
    }
  }
}

TEST(Bfloat16, RoundTripsEveryValue) {
  for (std::uint32_t h = 0; h < 0x10000; ++h) {
    const float x = bf16_to_float(static_cast<std::uint16_t>(h));
    if (std::isnan(x)) {
      ASSERT_EQ(float_to_bf16(x), 0x7FC0);
    } else {
      ASSERT_EQ(float_to_bf16(x), h);
    }
  }
}

TEST(Float16, RoundTripsEveryValue) {
  for (std::uint32_t h = 0; h < 0x10000; ++h) {
    const float x = fp16_to_float(static_cast<std::uint16_t>(h));
    if ((h & 0x7FFF) > 0x7C00) {
      ASSERT_TRUE(std::isnan(x));
      ASSERT_EQ(float_to_fp16(x) & 0x7FFF, 0x7E00);
    } else {
      ASSERT_EQ(float_to_fp16(x), h);
    }
  }
}

TEST(Float16, RoundsToNearestEven) {
  EXPECT_EQ(float_to_fp16(65519.0f), 0x7BFF);
  EXPECT_EQ(float_to_fp16(65520.0f), 0x7C00);
  EXPECT_EQ(float_to_fp16(1.0f + std::ldexp(1.0f, -11)), 0x3C00);
  EXPECT_EQ(float_to_fp16(1.0f + 3 * std::ldexp(1.0f, -11)), 0x3C02);
  EXPECT_EQ(float_to_fp16(std::ldexp(1.0f, -25)), 0x0000);
  EXPECT_EQ(float_to_fp16(std::ldexp(1.5f, -25)), 0x0001);
  EXPECT_EQ(float_to_fp16(-kInf), 0xFC00);
  EXPECT_TRUE(std::isnan(fp16_to_float(float_to_fp16(kNan))));
}

StepScalars scalars(double weight_decay, DecayAt decay_at) {
  StepScalars s;
  s.lr = 0.1;
  s.w = 0.25;
  s.a = -0.05;
  s.weight_decay = weight_decay;
  s.decay_at = decay_at;
  return s;
}

TEST(SgdUpdate, FollowsTheFormula) {
  for (const DecayAt at : {DecayAt::kNowhere, DecayAt::kY, DecayAt::kZ}) {
    const StepCoefs<double> s(scalars(0.5, at));
    double y = 2.0, z = -1.0;
    const double decayed = at == DecayAt::kNowhere ? 0.0 : at == DecayAt::kY ? 2.0 : -1.0;
    const double u = 3.0 + 0.5 * decayed;
    sgd_update(y, 3.0, z, at, s);
    EXPECT_DOUBLE_EQ(y, 2.0 + 0.25 * (-3.0) - 0.05 * u);
    EXPECT_DOUBLE_EQ(z, -1.0 - 0.1 * u);
  }
}

TEST(AdamwUpdate, FollowsTheFormula) {
  StepScalars step = scalars(0, DecayAt::kNowhere);
  step.grad_mul = -2;
  AdamScalars adam;
  adam.beta2 = 0.75;
  adam.inner_momentum = 0.5;
  adam.denom_scale = 2;
  adam.denom_eps = 0.5;
  double y = 2.0, z = -1.0, v = 4.0, m = 1.0;
  adamw_update<true>(y, 3.0, z, v, m, DecayAt::kNowhere, StepCoefs<double>(step), AdamCoefs<double>(adam));
  EXPECT_DOUBLE_EQ(v, 0.75 * 4 + 0.25 * 36);
  EXPECT_DOUBLE_EQ(m, 0.5 * 1 + 0.5 * -6);
  const double u = m / (2 * std::sqrt(v) + 0.5);
  EXPECT_DOUBLE_EQ(y, 2.0 - 0.75 - 0.05 * u);
  EXPECT_DOUBLE_EQ(z, -1.0 - 0.1 * u);
}

TEST(AdamwUpdate, ZeroGradientsStayZero) {
  AdamScalars adam;
  adam.beta2 = 0.999;
  adam.denom_eps = 1e-8;
  float y = 1.0f, z = 1.0f, v = 0.0f, unused = 0.0f;
  adamw_update<false>(y, 0.0f, z, v, unused, DecayAt::kNowhere,
                      StepCoefs<float>(scalars(0, DecayAt::kNowhere)), AdamCoefs<float>(adam));
  EXPECT_EQ(y, 1.0f);
  EXPECT_EQ(z, 1.0f);
  EXPECT_EQ(v, 0.0f);
}

}  // namespace
}  // namespace schedulefree
