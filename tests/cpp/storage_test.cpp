#include "storage.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

namespace schedulefree {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::uint32_t bits_of(float x) { return bit_cast<std::uint32_t>(x); }

bool is_long() {
  const char* const longer = std::getenv("SCHEDULEFREE_LONG_TESTS");
  return longer != nullptr && std::string(longer) == "1";
}

// Every float with SCHEDULEFREE_LONG_TESTS=1; otherwise every 997th, and those around powers of two.
template <typename Check>
void for_floats(const Check& check) {
  const bool all = is_long();
  for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += all ? 1 : 997)
    check(bit_cast<float>(static_cast<std::uint32_t>(bits)));
  for (std::uint32_t field = 0; field < 512; ++field) {
    for (std::uint32_t beside = 0; beside < 2048; ++beside)
      check(bit_cast<float>((field << 23) + beside - 1024));
  }
}

template <typename Format>
struct Stored {
  typename Format::Word word = 0;
  typename Format::Low low = 0;

  explicit Stored(float x) { Format::narrow(Format::rounded(x), word, low); }
  float back() const { return Format::widen(word, low); }
};

TEST(SplitBf16, IsTheFloat32) {
  for_floats([](float x) {
    const Stored<SplitBf16> stored(x);
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(stored.back()));
      ASSERT_TRUE(std::isnan(bf16_to_float(stored.word)));
      return;
    }
    ASSERT_EQ(bits_of(stored.back()), bits_of(x));
    // The high half is a nearest bfloat16.
    if (std::fabs(x) < 3e38f && std::fabs(x) > 1e-30f) {
      ASSERT_LE(std::fabs(bf16_to_float(stored.word) - x), std::ldexp(std::fabs(x), -8));
    }
  });
}

TEST(SplitFp16, IsTheFloat32InTheRangeOfFloat16) {
  for_floats([](float x) {
    const Stored<SplitFp16> stored(x);
    const float magnitude = std::fabs(x), back = stored.back();
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(back));
      ASSERT_TRUE(std::isnan(fp16_to_float(stored.word)));
      return;
    }
    ASSERT_EQ(std::signbit(back), std::signbit(x));
    ASSERT_EQ(bits_of(back), bits_of(SplitFp16::rounded(x)));
    ASSERT_EQ(bits_of(back), bits_of(SplitFp16::rounded(static_cast<double>(x))));
    if (magnitude >= 65520) {
      ASSERT_EQ(std::fabs(back), kInf);
      ASSERT_EQ(stored.low, 0);
      return;
    }
    if (magnitude >= 0x1p-17f) {
      ASSERT_EQ(bits_of(back), bits_of(x));
    } else {
      ASSERT_LE(std::fabs(static_cast<double>(back) - static_cast<double>(x)), 0x1p-41);
    }
    // The high half is a nearest float16.
    const double nearest = static_cast<double>(fp16_to_float(float_to_fp16(x)));
    const double high = static_cast<double>(fp16_to_float(stored.word));
    ASSERT_LE(std::fabs(high - static_cast<double>(back)),
              std::fabs(nearest - static_cast<double>(x)) + 0x1p-40)
        << x;
  });
}

TEST(Split24, HasTheNearestOf16Bits) {
  for_floats([](float x) {
    const Stored<Split24> stored(x);
    const float back = stored.back();
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(back));
      ASSERT_TRUE(std::isnan(bf16_to_float(stored.word)));
      return;
    }
    ASSERT_EQ(bits_of(back), bits_of(Split24::rounded(x)));
    ASSERT_EQ(bits_of(back) & 0xFFu, 0u);
    ASSERT_EQ(bits_of(Split24::rounded(back)), bits_of(back));
    const std::uint32_t below = bits_of(x) & 0xFFFFFF00u, above = below + 0x100u;
    const std::uint32_t over = bits_of(x) & 0xFFu;
    const bool up = over > 0x80u || (over == 0x80u && (below & 0x100u));
    ASSERT_EQ(bits_of(back), up ? above : below);
  });
}

// Every word with every low half, whatever wrote them: a value no further from the word's own than half way
// to the next word, or the word's own infinity or NaN. Without SCHEDULEFREE_LONG_TESTS=1, 16 bits of a low
// half are those at the ends, around 0, and every 251st.
template <typename Format>
void expect_every_word_is_near_its_own_value(float (*own_value)(std::uint16_t), double infinity) {
  using Low = typename Format::Low;
  constexpr int kLeast = std::numeric_limits<Low>::min(), kMost = std::numeric_limits<Low>::max();
  const auto magnitude = [&](std::uint32_t word) {
    const double value = static_cast<double>(own_value(static_cast<std::uint16_t>(word)));
    return std::isfinite(value) ? value : infinity;
  };
  for (std::uint32_t word = 0; word < 0x10000; ++word) {
    const auto stored = static_cast<std::uint16_t>(word);
    const float own = own_value(stored);
    const std::uint32_t unsigned_word = word & 0x7FFFu;
    const double here = magnitude(unsigned_word);
    const double least = unsigned_word == 0 ? 0 : (magnitude(unsigned_word - 1) + here) / 2;
    const double most = (here + magnitude(unsigned_word + 1)) / 2;
    const auto is_near = [&](int low, float value) {
      if (std::isnan(own)) return std::isnan(value);
      const double size = std::fabs(static_cast<double>(value));
      const bool alone = low == 0 || (here == 0 && low < 0) || (here == infinity && low > 0);
      if (alone) return bits_of(value) == bits_of(own);
      return std::signbit(value) == std::signbit(own) && size >= least && size <= most && size < infinity;
    };
    int low = kLeast;
    const auto holds = [&] {
      const float value = Format::widen(stored, static_cast<Low>(low));
      return (here == infinity && bits_of(value) == bits_of(own)) || is_near(low, value);
    };
    const int step = kMost > 127 && !is_long() ? 251 : 1;
    while (low <= kMost && holds()) low += step;
    if (low > kMost) {
      for (const int other : {kLeast + 1, -1, 0, 1, kMost - 1, kMost})
        if (low = other; !holds()) break;
    }
    ASSERT_TRUE(holds()) << std::hex << "word " << word << std::dec << ", low half " << low << ": "
                         << Format::widen(stored, static_cast<Low>(low));
  }
}

TEST(SplitBf16, EveryWordIsNearItsOwnValue) {
  expect_every_word_is_near_its_own_value<SplitBf16>(&bf16_to_float, 0x1p128);
}
TEST(SplitFp16, EveryWordIsNearItsOwnValue) {
  expect_every_word_is_near_its_own_value<SplitFp16>(&fp16_to_float, 0x1p16);
}
TEST(Split24, EveryWordIsNearItsOwnValue) {
  expect_every_word_is_near_its_own_value<Split24>(&bf16_to_float, 0x1p128);
}

// What lies between two floats is rounded once: towards the nearer, not by way of a float.
template <typename Format>
void expect_rounded_once(int smallest, int largest, double unit, double smallest_unit) {
  std::mt19937_64 random(6);
  for (int i = 0; i < 1'000'000; ++i) {
    const int exponent =
        smallest + static_cast<int>(random() % static_cast<unsigned>(largest - smallest + 1));
    const double place = std::fmax(std::ldexp(unit, exponent), smallest_unit);
    // Near a tie, by less than a float sees.
    const double tie =
        std::floor(std::ldexp(1.0, exponent) / place * (1 + static_cast<double>(random() % 1000) / 1000)) +
        0.5;
    const double offset = std::ldexp(static_cast<double>(random() % 64) - 32, -16);
    const double x = (tie + offset) * place * (random() % 2 ? 1 : -1);
    const double expected = std::nearbyint(x / place) * place;
    ASSERT_EQ(static_cast<double>(Format::rounded(x)), expected) << std::hexfloat << x;
  }
}

TEST(SplitFp16, RoundsDoublesOnce) { expect_rounded_once<SplitFp16>(-45, -18, 0x1p-60, 0x1p-40); }
TEST(Split24, RoundsDoublesOnce) { expect_rounded_once<Split24>(-141, 100, 0x1p-15, 0x1p-141); }

TEST(Split24, RoundsAtRandomWithTheRightProbability) {
  for (const float x : {1.0f + 0x1p-20f, -3.0f - 0x1p-19f, 1e-30f, 0x1.fffffep+10f}) {
    const double below = std::fabs(bit_cast<float>(bits_of(x) & 0xFFFFFF00u));
    const double step = std::fabs(bit_cast<float>((bits_of(x) & 0xFFFFFF00u) + 0x100u)) - below;
    double sum = 0;
    for (std::uint32_t random = 0; random < 256; ++random) {
      const float rounded = Split24::stochastic(x, random);
      ASSERT_EQ(bits_of(Split24::rounded(rounded)), bits_of(rounded));
      sum += static_cast<double>(std::fabs(rounded));
    }
    EXPECT_NEAR(sum / 256, static_cast<double>(std::fabs(x)), step / 256);
  }
  EXPECT_EQ(Split24::stochastic(-kInf, 255), -kInf);
  EXPECT_TRUE(std::isnan(Split24::stochastic(kNan, 255)));
}

TEST(RandomBits, DependOnStepAndElementAlone) {
  EXPECT_EQ(random_bits(1, 2), random_bits(1, 2));
  EXPECT_NE(random_bits(1, 2), random_bits(2, 2));
  EXPECT_NE(random_bits(1, 2), random_bits(1, 3));
  EXPECT_NE(random_bits(1, 2), random_bits(1, 2 + (std::int64_t{1} << 32)));
  EXPECT_EQ(random_bits(1, 1024, 7), random_bits(1, 1031));
  EXPECT_EQ(random_bits(1, (std::int64_t{5} << 32) - 1024, 1023),
            random_bits(1, (std::int64_t{5} << 32) - 1));
  // Each bit is set half of the time, whatever the others of the step or the element before.
  constexpr int kDraws = 1 << 16;
  for (int bit = 12; bit < 32; ++bit) {
    int set = 0, same = 0, same_step = 0;
    for (int i = 0; i < kDraws; ++i) {
      const std::uint32_t now = random_bits(7, i), next = random_bits(7, i + 1), later = random_bits(8, i);
      set += static_cast<int>(now >> bit & 1);
      same += static_cast<int>((now ^ next) >> bit & 1);
      same_step += static_cast<int>((now ^ later) >> bit & 1);
    }
    for (const int count : {set, same, same_step}) EXPECT_NEAR(count, kDraws / 2, 4 * 128) << bit;
  }
}

constexpr std::uint32_t kRandoms = 1u << Moment8::kCut, kFirst = 32 - Moment8::kCut;

float scale_of(float largest) { return Moment8::scale(Moment8::order(largest)); }

TEST(Moment8, IsUnbiased) {
  const float scale = scale_of(3e-7f);
  for (const float v : {3e-7f, 1e-7f, 1e-9f, 1e-12f, 1.5e-16f}) {
    double sum = 0;
    float least = kInf, most = 0;
    for (std::uint32_t random = 0; random < kRandoms; ++random) {
      const float stored = Moment8::decoded(Moment8::encoded(v, scale, random << kFirst), scale);
      sum += static_cast<double>(stored);
      least = std::fmin(least, stored);
      most = std::fmax(most, stored);
    }
    EXPECT_NEAR(sum / kRandoms, static_cast<double>(v), 1e-9 * static_cast<double>(v));
    EXPECT_LE(least, v);
    EXPECT_GE(most, v);
    EXPECT_LE(most - least, v / 8) << v;
  }
}

TEST(Moment8, StoresWhatItHasRead) {
  for (const float largest : {3e-7f, 1.0f, 1e-30f, 1e-40f, 3e38f}) {
    const float scale = scale_of(largest);
    for (int code = 0; code < 256; ++code) {
      const float v = Moment8::decoded(static_cast<std::uint8_t>(code), scale);
      for (const std::uint32_t random : {0u, kRandoms - 1}) {
        ASSERT_EQ(Moment8::encoded(v, scale, random << kFirst), code);
      }
    }
  }
}

TEST(Moment8, KeepsZerosAloneAndNothingElseAtZero) {
  EXPECT_EQ(scale_of(0.0f), 0.0f);
  for (const std::uint32_t random : {0u, kRandoms - 1}) {
    EXPECT_EQ(Moment8::decoded(Moment8::encoded(0.0f, 0.0f, random << kFirst), 0.0f), 0.0f);
    for (const float largest : {1.0f, 1e-30f, 3e38f, 1e-39f, 1e-45f}) {
      const float scale = scale_of(largest);
      EXPECT_GT(scale, 0.0f);
      EXPECT_GT(Moment8::decoded(Moment8::encoded(1e-45f, scale, random << kFirst), scale), 0.0f);
      const float stored = Moment8::decoded(Moment8::encoded(largest, scale, random << kFirst), scale);
      if (largest > 1e-37f) {
        EXPECT_NEAR(stored / largest, 1, 0.125) << largest;
      }
    }
  }
}

TEST(Moment8, KeepsItsLargestCodeForWhatIsBeyond) {
  const float most = bit_cast<float>(0x7F700000u);
  for (const float v : {kInf, kNan, -kNan, bit_cast<float>(0xFFFFFFFFu), std::numeric_limits<float>::max()}) {
    const float scale = scale_of(v);
    for (const std::uint32_t random : {0u, kRandoms - 1}) {
      EXPECT_EQ(Moment8::decoded(Moment8::encoded(v, scale, random << kFirst), scale), most);
      EXPECT_EQ(Moment8::encoded(1.0f, scale, random << kFirst), 0);
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

}  // namespace
}  // namespace schedulefree
