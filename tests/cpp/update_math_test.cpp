#include "update_math.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <random>
#include <string>

#include "schedule.h"
#include "storage.h"

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

StepCoefficients coefs(double weight_decay = 0) {
  StepCoefficients c;
  c.lr = 0.1;
  c.w = 0.25;
  c.a = -0.05;
  c.weight_decay = weight_decay;
  c.grad_mul = 1;
  c.denom_scale = 1;
  c.beta = 0.9;
  return c;
}

TEST(SgdUpdate, FollowsTheFormula) {
  for (const DecayAt at : {DecayAt::kNowhere, DecayAt::kY, DecayAt::kZ}) {
    const StepScalars<double> s(coefs(0.5));
    double y = 2.0, z = -1.0;
    const double decayed = at == DecayAt::kNowhere ? 0.0 : at == DecayAt::kY ? 2.0 : -1.0;
    const double u = 3.0 + 0.5 * decayed;
    sgd_update(y, 3.0, z, at, s);
    EXPECT_DOUBLE_EQ(y, 2.0 + 0.25 * (-3.0) - 0.05 * u);
    EXPECT_DOUBLE_EQ(z, -1.0 - 0.1 * u);
  }
}

TEST(AdamwUpdate, FollowsTheFormula) {
  StepCoefficients c = coefs();
  c.grad_mul = -2;
  c.beta2 = 0.75;
  c.inner_momentum = 0.5;
  c.denom_scale = 2;
  c.denom_eps = 0.5;
  double y = 2.0, z = -1.0, v = 4.0, m = 1.0;
  adamw_update<true>(y, 3.0, z, v, m, DecayAt::kNowhere, StepScalars<double>(c));
  EXPECT_DOUBLE_EQ(v, 0.75 * 4 + 0.25 * 36);
  EXPECT_DOUBLE_EQ(m, 0.5 * 1 + 0.5 * -6);
  const double u = m / (2 * std::sqrt(v) + 0.5);
  EXPECT_DOUBLE_EQ(y, 2.0 - 0.75 - 0.05 * u);
  EXPECT_DOUBLE_EQ(z, -1.0 - 0.1 * u);
}

TEST(AdamwUpdate, ZeroGradientsStayZero) {
  StepCoefficients c = coefs();
  c.beta2 = 0.999;
  c.denom_eps = 1e-8;
  float y = 1.0f, z = 1.0f, v = 0.0f, unused = 0.0f;
  adamw_update<false>(y, 0.0f, z, v, unused, DecayAt::kNowhere, StepScalars<float>(c));
  EXPECT_EQ(y, 1.0f);
  EXPECT_EQ(z, 1.0f);
  EXPECT_EQ(v, 0.0f);
}

// ---- settling --------------------------------------------------------------------------------------
//
// SCHEDULEFREE_LONG_TESTS=1 has the IsDoneOnce tests take a hundred times as many inputs: 2e9 in all.

// Pairs of y and z, most of them where rounding is hardest: beside powers of two, subnormal, with z at any
// distance, or such that x is beside a power of two.
class Pairs {
 public:
  // y has an exponent in [smallest, largest], and is subnormal in float where `smallest` is -127.
  Pairs(std::uint64_t seed, int smallest, int largest)
      : state_(seed), smallest_(smallest), exponents_(largest - smallest + 1) {}

  void next(double beta, float& y, float& z) {
    const std::uint64_t random = bits();
    const int exponent = smallest_ + static_cast<int>((random >> 32) % static_cast<unsigned>(exponents_));
    y = number(exponent);
    switch (random & 7) {
      case 0:  // x beside a power of two
        z = y + (number(exponent + static_cast<int>(random >> 3 & 3) - 1, 1) - y) /
                    static_cast<float>(y_to_x_weight(beta).hi);
        break;
      case 1:  // far
        z = number(exponent + static_cast<int>(random >> 3 & 63) - 32);
        break;
      case 2:  // anything
        z = bit_cast<float>(static_cast<std::uint32_t>(bits()));
        break;
      case 3:  // close
        z = y * (1 + std::ldexp(static_cast<float>(random >> 8 & 255) - 128, -10));
        break;
      default:
        z = number(exponent + static_cast<int>(random >> 3 & 7) - 4);
    }
  }

 private:
  std::uint64_t bits() {  // splitmix64
    std::uint64_t x = state_ += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }

  // A float of an exponent and either sign, one in `beside` of them near a power of two.
  float number(int exponent, unsigned beside = 4) {
    const std::uint64_t random = bits();
    const auto field = static_cast<std::uint32_t>(exponent < -127  ? 0
                                                  : exponent > 127 ? 254
                                                                   : exponent + 127);
    auto mantissa = static_cast<std::uint32_t>(random >> 40) & 0x7FFFFFu;
    if ((random >> 8 & 0xFF) % beside == 0) {
      mantissa >>= 16 + (random >> 16 & 7);
      if (random & 2) mantissa = 0x7FFFFFu - mantissa;
    }
    return bit_cast<float>(static_cast<std::uint32_t>(random & 1) << 31 | field << 23 | mantissa);
  }

  std::uint64_t state_;
  int smallest_, exponents_;
};

struct Settled {
  std::int64_t moved = 0;    // by settling
  std::int64_t again = 0;    // by settling once more
  std::int64_t lost = 0;     // not returned by a swap and one back
  std::int64_t missed = 0;   // moved, and may_move() is 0
  std::int64_t too_far = 0;  // moved by more than two units in the last place of x
};

// What is stored of a y.
template <typename Y, typename Real>
Real settled(Real y, Real z, const SettleScalars& s) {
  y = Y::rounded(y);
  settle<Y, 1>(&y, &z, s);
  return y;
}

// `unit` is that of 1 in the parameter's format, `smallest` the format's smallest number.
struct Format {
  float unit, smallest;
};

template <typename Y>
Settled settle_pairs(double beta, std::int64_t count, Pairs pairs, Format format) {
  const auto differ = [](float a, float b) {
    return bit_cast<std::uint32_t>(a) != bit_cast<std::uint32_t>(b);
  };
  const SettleScalars s(beta);
  Settled result;
  for (std::int64_t i = 0; i < count; ++i) {
    float given = 0, z = 0;
    pairs.next(beta, given, z);
    z = Y::State::rounded(z);
    const float before = Y::rounded(given), y = settled<Y>(given, z, s);
    const float x = Y::rounded(swapped(y, z, s.to_x));
    const bool moves = differ(y, before);
    result.moved += moves;
    result.again += differ(settled<Y>(y, z, s), y);
    result.lost += std::isfinite(y) && std::isfinite(x) && differ(Y::rounded(swapped(x, z, s.to_y)), y);
    result.missed += moves && !always_moves(s) && may_move(before, z, s) == 0;
    result.too_far += std::fabs(y - before) > 2 * (format.unit * std::fabs(x) + format.smallest);
  }
  return result;
}

constexpr double kBetas[] = {
    0.01, 0.04, 0.051, 0.1,    0.3,         1.0 / 3,     0.5,         0.6,         0.75,     0.8,       0.9,
    0.95, 0.98, 0.999, 0.9995, 1 - 0x1p-11, 1 - 0x1p-17, 1 - 0x1p-23, 1 - 0x1p-25, 1 - 1e-8, 1 - 1e-12, 1};

template <typename Y>
void expect_settled(std::int64_t count, int smallest, int largest, Format format) {
  const char* const longer = std::getenv("SCHEDULEFREE_LONG_TESTS");
  if (longer != nullptr && std::string(longer) == "1") count *= 100;
  std::int64_t moved = 0;
  std::uint64_t seed = 0;
  for (const double beta : kBetas) {
    const Settled result = settle_pairs<Y>(beta, count / static_cast<std::int64_t>(std::size(kBetas)),
                                           Pairs(seed++ << 40, smallest, largest), format);
    EXPECT_EQ(result.again, 0) << "beta " << beta;
    EXPECT_EQ(result.lost, 0) << "beta " << beta;
    EXPECT_EQ(result.missed, 0) << "beta " << beta;
    EXPECT_EQ(result.too_far, 0) << "beta " << beta;
    moved += result.moved;
  }
  EXPECT_GT(moved, count / 20);
}

TEST(Settle, IsDoneOnceInFloat32) { expect_settled<Float32>(10'000'000, -127, 127, {0x1p-23f, 0x1p-149f}); }

TEST(Settle, IsDoneOnceInASplitFloat16) {
  expect_settled<SplitFp16>(5'000'000, -42, 15, {0x1p-23f, 0x1p-40f});
}

TEST(Settle, IsDoneOnceIn24Bits) { expect_settled<Split24>(5'000'000, -127, 127, {0x1p-15f, 0x1p-141f}); }

// The second power of two is reached only from the first.
TEST(Settle, PassesTwoPowersOfTwo) {
  const SettleScalars s(1 - 0x1p-25);
  const float y = settled<Float32>(1 + 0x1p-23f, -0x1.fffffcp+24f, s);
  EXPECT_EQ(y, 1 - 0x1p-24f);
  EXPECT_EQ(settled<Float32>(y, -0x1.fffffcp+24f, s), y);
}

TEST(Settle, SettlesFloat64) {
  std::mt19937_64 random(4);
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<int> exponent(-60, 60);
  for (const double beta : kBetas) {
    const SettleScalars s(beta);
    for (int i = 0; i < 100'000; ++i) {
      double y = normal(random);
      const double z = std::ldexp(normal(random), i % 2 ? 0 : exponent(random));
      if (i % 3 == 0) y = std::ldexp(1 + static_cast<double>(i % 7 - 3) * 0x1p-53, std::ilogb(y));
      if (i % 5 == 0) y = swapped(std::ldexp(1 + static_cast<double>(i % 7 - 3) * 0x1p-53, 1), z, s.to_y);
      const double stored = settled<Float64>(y, z, s);
      const double x = swapped(stored, z, s.to_x);
      const double unit = 0x1p-52 * (std::fabs(x) + std::fabs(y) + std::fabs(z));
      ASSERT_LE(std::fabs(stored - y), unit);
      ASSERT_EQ(swapped(x, z, s.to_y), stored) << y << ' ' << z << ' ' << beta;
    }
  }
}

TEST(Settle, LeavesWhatIsNotFinite) {
  const SettleScalars s(0.9);
  const auto expect_kept = [&](auto y, auto z, auto format) {
    using Y = decltype(format);
    const auto stored = settled<Y>(y, z, s);
    EXPECT_TRUE(stored == Y::rounded(y) || (std::isnan(stored) && std::isnan(y))) << y << ", " << z;
  };
  const float huge = std::numeric_limits<float>::max();
  for (const float y : {1.0f, 0.0f, -3.3f, huge, -kInf, kInf, kNan}) {
    for (const float z : {kInf, -kInf, kNan}) {
      expect_kept(y, z, Float32{});
      expect_kept(static_cast<double>(y), static_cast<double>(z), Float64{});
      expect_kept(y, z, SplitFp16{});
      expect_kept(y, z, Split24{});
    }
  }
  expect_kept(huge, -huge, Float32{});  // x overflows
  expect_kept(65504.0f, -65504.0f, SplitFp16{});
  expect_kept(65535.0f, 1.0f, SplitFp16{});  // y overflows when it is stored
  expect_kept(kInf, 1.0f, Float32{});
  expect_kept(kNan, 1.0f, Float32{});
}

}  // namespace
}  // namespace schedulefree
