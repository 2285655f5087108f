// The formats in which parameters, gradients and state lie in memory.
//
// The arithmetic of update_math.h knows none of them. A format is a struct of static functions, the same for
// the CPU kernels and the CUDA kernels:
//
//   Real                     the type of the arithmetic
//   Word, Low                what one element is in memory: a word, and a low half in a tensor of its own;
//   kHasLow                  without one, Low is unused
//   widen(word, low)         the value of an element
//   narrow(x, word, low)     the element of a value that rounded() has returned
//   rounded(x)               the value nearest to a Real that the format has, ties to even
//   rounded(double)          the same of a value that has not been rounded to Real
//   State                    the format of z beside a parameter of this one
//   kSteps                   whether parameters have it in a step, and not in swaps alone
//   kStochastic              whether stochastic() is there: rounded() up or down at random
//
// NaNs are made canonical, for a payload could round to infinity.
//
// A program may set words and know nothing of their low halves. So widen() of a word and a low half that
// narrow() does not write together is the value of the word alone where their sum would be none: 0 for 0, and
// a word's own infinity or NaN. Everywhere else a low half stays within half a unit of any word.
#pragma once

#include <cstdint>

#include "update_math.h"

namespace schedulefree {

// ---- 16-bit formats --------------------------------------------------------------------------------

SCHEDULEFREE_INLINE float bf16_to_float(std::uint16_t h) {
  return bit_cast<float>(static_cast<std::uint32_t>(h) << 16);
}

// Round to nearest, ties to even; every NaN becomes the canonical quiet one.
SCHEDULEFREE_INLINE std::uint16_t float_to_bf16(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

SCHEDULEFREE_INLINE float fp16_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::int32_t magnitude = h & 0x7FFF;
  // Normal numbers and infinities: move the fields and rebias. Multiplying by 2^112 rebias exactly;
  // the exponent 31 of infinities and NaNs is raised to 255 by hand.
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);
  const std::uint32_t special = magnitude > 0x7BFF ? 0x7F800000u : 0u;
  return bit_cast<float>(bit_cast<std::uint32_t>(scaled) | special | sign);
}

// Round to nearest, ties to even; every NaN becomes the canonical quiet one.
SCHEDULEFREE_INLINE std::uint16_t float_to_fp16(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Subnormal results: adding 0.5 aligns the last fp16 bit with the last fp32 bit, so the addition
  // itself rounds.
  const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  std::uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x47800000u ? 0x7C00u : h;
  h = magnitude > 0x7F800000u ? 0x7E00u : h;
  return static_cast<std::uint16_t>(h | ((bits >> 16) & 0x8000u));
}

// What a word and its low half add up to. It is no number where the low half is of another word: below 0, or
// beyond an infinity. There the word counts alone.
SCHEDULEFREE_INLINE float number_or_word(std::uint32_t sum, std::uint16_t word) {
  const float value = bit_cast<float>(sum);
  return value != value ? bf16_to_float(word) : value;
}

// The bits of x, those of any NaN made canonical.
SCHEDULEFREE_INLINE std::uint32_t canonical_bits(float x) {
  return bit_cast<std::uint32_t>(x != x ? bit_cast<float>(0x7FC00000u) : x);
}

// ---- formats ---------------------------------------------------------------------------------------

// A double rounded to `digits` bits after the leading one, or like numbers from `least` on where it is
// smaller.
template <int digits>
SCHEDULEFREE_INLINE float rounded_once(double x, double least) {
  const std::uint64_t bits = bit_cast<std::uint64_t>(x), sign = bits & 0x8000000000000000u;
  const double absolute = bit_cast<double>(bits ^ sign), larger = absolute > least ? absolute : least;
  // 1.5 times a power of two that leaves the digits wanted of a sum.
  const std::uint64_t exponent = bit_cast<std::uint64_t>(larger) & 0x7FF0000000000000u;
  const double magic =
      bit_cast<double>(exponent + ((std::uint64_t{52 - digits} << 52) + (std::uint64_t{1} << 51)));
  const double nearest = (absolute + magic) - magic;
  return static_cast<float>(bit_cast<double>(bit_cast<std::uint64_t>(nearest) | sign));
}

template <typename Real_>
struct Whole {
  using Real = Real_;
  using Word = Real_;
  using Low = std::int16_t;
  using State = Whole;
  static constexpr bool kHasLow = false;
  static constexpr bool kStochastic = false;
  static constexpr bool kSteps = true;

  SCHEDULEFREE_INLINE Real widen(Word word, Low) { return word; }
  SCHEDULEFREE_INLINE void narrow(Real x, Word& word, Low&) { word = x; }
  SCHEDULEFREE_INLINE float rounded(float x) { return x; }
  SCHEDULEFREE_INLINE Real rounded(double x) { return static_cast<Real>(x); }
};

using Float32 = Whole<float>;
using Float64 = Whole<double>;

// What a format of 16-bit words with a float32 state is.
struct Word16 {
  using Real = float;
  using Word = std::uint16_t;
  using Low = std::int16_t;
  using State = Float32;
  static constexpr bool kHasLow = false;
  static constexpr bool kStochastic = false;
  static constexpr bool kSteps = false;
};

// 16 bits alone: gradients, and parameters that are only swapped. A double is rounded twice, to float first.
struct Bf16 : Word16 {
  SCHEDULEFREE_INLINE Real widen(Word word, Low) { return bf16_to_float(word); }
  SCHEDULEFREE_INLINE void narrow(float x, Word& word, Low&) { word = float_to_bf16(x); }
  SCHEDULEFREE_INLINE float rounded(float x) { return bf16_to_float(float_to_bf16(x)); }
  SCHEDULEFREE_INLINE float rounded(double x) { return rounded(static_cast<float>(x)); }
};

struct Fp16 : Word16 {
  SCHEDULEFREE_INLINE Real widen(Word word, Low) { return fp16_to_float(word); }
  SCHEDULEFREE_INLINE void narrow(float x, Word& word, Low&) { word = float_to_fp16(x); }
  SCHEDULEFREE_INLINE float rounded(float x) { return fp16_to_float(float_to_fp16(x)); }
  SCHEDULEFREE_INLINE float rounded(double x) { return rounded(static_cast<float>(x)); }
};

// A float32 as a bfloat16, rounded to nearest with ties away from zero, and the signed 16 bits that turn it
// back into the same float32.
struct SplitBf16 : Word16 {
  static constexpr bool kHasLow = true;
  static constexpr bool kSteps = true;

  SCHEDULEFREE_INLINE float widen(Word word, Low low) {
    return number_or_word(
        (static_cast<std::uint32_t>(word) << 16) + static_cast<std::uint32_t>(static_cast<std::int32_t>(low)),
        word);
  }
  SCHEDULEFREE_INLINE void narrow(float x, Word& word, Low& low) {
    const std::uint32_t bits = canonical_bits(x);
    word = static_cast<Word>((bits + 0x8000u) >> 16);
    low = static_cast<Low>(static_cast<std::uint16_t>(bits));
  }
  SCHEDULEFREE_INLINE float rounded(float x) { return x; }
  SCHEDULEFREE_INLINE float rounded(double x) { return static_cast<float>(x); }
};

// A float16, rounded to nearest with ties away from zero, and what is missing of the magnitude in units of
// the float16's last place / 2^16. That is the float32 from 2^-17 on, whose last place is 2^-40; below, it is
// a multiple of 2^-40. A value that float16 does not reach is an infinity.
struct SplitFp16 : Word16 {
  static constexpr bool kHasLow = true;
  static constexpr bool kSteps = true;

  SCHEDULEFREE_INLINE float widen(Word word, Low low) {
    const std::int32_t magnitude = word & 0x7FFF;
    // From 0x7C00 on, which stands for 2^16: an infinity or a NaN. Signed numbers are cheaper to compare.
    const bool special = magnitude > 0x7BFF;
    // Word and low half are one number, which counts as the bits of a float do, from 2^-14 on.
    const std::int32_t count = (magnitude << 16) + (special ? 0 : low);
    const std::int32_t normal = (count >> 3) + (special ? 0x70000000 : 0x38000000);
    const float small = static_cast<float>(count) * bit_cast<float>(0x2B800000u);  // 2^-40
    const float least = small > 0 ? small : 0;
    const float absolute = count < 0x04000000 ? least : bit_cast<float>(normal);
    return bit_cast<float>(bit_cast<std::uint32_t>(absolute) | static_cast<std::uint32_t>(word & 0x8000)
                                                                   << 16);
  }
  SCHEDULEFREE_INLINE void narrow(float x, Word& word, Low& low) {
    const std::uint32_t sign = bit_cast<std::uint32_t>(x) & 0x80000000u;
    const auto magnitude = static_cast<std::int32_t>(bit_cast<std::uint32_t>(x) ^ sign);
    const float absolute = bit_cast<float>(magnitude), least = bit_cast<float>(0x38800000u);  // 2^-14
    const float scaled = (absolute < least ? absolute : least) * bit_cast<float>(0x53800000u);
    const auto small = static_cast<std::int32_t>(scaled);  // times 2^40, whole
    const std::int32_t finite = magnitude < 0x47800000 ? magnitude : 0x47800000;
    const auto normal = static_cast<std::int32_t>(static_cast<std::uint32_t>(finite - 0x38000000) << 3);
    const std::int32_t count = absolute < least ? small : normal;
    const std::int32_t high = absolute != absolute ? 0x7E000000 : count + 0x8000;
    word = static_cast<Word>((static_cast<std::uint32_t>(high) | sign) >> 16);
    low = static_cast<Low>(count);
  }
  SCHEDULEFREE_INLINE float rounded(float x) {
    const std::uint32_t sign = bit_cast<std::uint32_t>(x) & 0x80000000u;
    const float absolute = bit_cast<float>(bit_cast<std::uint32_t>(x) ^ sign);
    // Below 2^-17 to a multiple of 2^-40: from 2^-17 to 2^-16, floats are as far apart.
    const float least = bit_cast<float>(0x37000000u);
    float result = absolute < least ? (absolute + least) - least : absolute;
    result = absolute >= 65520.0f ? bit_cast<float>(0x7F800000u) : result;
    return bit_cast<float>(bit_cast<std::uint32_t>(result) | sign);
  }
  SCHEDULEFREE_INLINE float rounded(double x) {
    return rounded(rounded_once<23>(x, bit_cast<double>(std::uint64_t{0x3EE0000000000000u})));  // 2^-17
  }
};

// 16 significant bits in the range of float32: a bfloat16, rounded to nearest with ties away from zero, and a
// low half of 8 bits.
struct Split24 {
  using Real = float;
  using Word = std::uint16_t;
  using Low = std::int8_t;
  using State = Split24;
  static constexpr bool kHasLow = true;
  static constexpr bool kStochastic = true;
  static constexpr bool kSteps = true;

  SCHEDULEFREE_INLINE float widen(Word word, Low low) {
    return number_or_word((static_cast<std::uint32_t>(word) << 16) +
                              (static_cast<std::uint32_t>(static_cast<std::int32_t>(low)) << 8),
                          word);
  }
  SCHEDULEFREE_INLINE void narrow(float x, Word& word, Low& low) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    word = static_cast<Word>((bits + 0x8000u) >> 16);
    low = static_cast<Low>(static_cast<std::uint8_t>(bits >> 8));
  }
  SCHEDULEFREE_INLINE float rounded(float x) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const std::uint32_t nearest = (bits + 0x7Fu + ((bits >> 8) & 1u)) & 0xFFFFFF00u;
    return x != x ? bit_cast<float>(0x7FC00000u) : bit_cast<float>(nearest);
  }
  SCHEDULEFREE_INLINE float rounded(double x) {
    const float nearest =
        rounded_once<15>(x, bit_cast<double>(std::uint64_t{0x3810000000000000u}));  // 2^-126
    // By a mask: GCC would make branches of a choice that settling looks at.
    const std::uint32_t bits = bit_cast<std::uint32_t>(nearest);
    const std::uint32_t nan = 0 - ((0x7F800000u - (bits & 0x7FFFFFFFu)) >> 31);
    return bit_cast<float>((bits & ~nan) | (0x7FC00000u & nan));
  }
  // Up with the probability of what is cut off. `random` has 8 bits.
  SCHEDULEFREE_INLINE float stochastic(float x, std::uint32_t random) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const std::uint32_t result = (bits + random) & 0xFFFFFF00u;
    return bit_cast<float>((bits & 0x7FFFFFFFu) >= 0x7F800000u ? bits : result);
  }
};

// ---- random numbers --------------------------------------------------------------------------------

// Random bits of element begin + i of a parameter, counted in the order of its memory, in the step with this
// key: they depend on nothing else. The element has the upper 32 bits of begin, so that loops over i have 32
// bits. Half a scramble leaves a strong pattern in the lower 12 bits, and they are not used: of the others y
// takes the lower 8, z the next 8, and the second moment all.
SCHEDULEFREE_INLINE std::uint32_t random_bits(std::uint32_t key, std::int64_t begin, std::uint32_t i = 0) {
  const auto low = static_cast<std::uint32_t>(begin), high = static_cast<std::uint32_t>(begin >> 32);
  std::uint32_t x = (low + high * 0x9E3779B9u + key) + i;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  return x * 0x846CA68Bu;
}

// Rounds what a step has made of an element of a parameter of format Y; where that is at random, by `random`.
template <typename Y, bool at_random>
SCHEDULEFREE_INLINE void round_update(typename Y::Real& y, typename Y::Real& z, std::uint32_t random) {
  if constexpr (at_random) {
    y = Y::stochastic(y, random >> 12 & 0xFFu);
    z = Y::State::stochastic(z, random >> 20 & 0xFFu);
  }
  y = Y::rounded(y);
  z = Y::State::rounded(z);
}

// ---- second moments --------------------------------------------------------------------------------

// A mean square that is kept as the arithmetic has it.
template <typename Real>
struct WholeMoment {
  using Word = Real;
  static constexpr bool kShares = false;  // whether elements share a scale
};

// A mean square as a code of 8 bits and a scale that 128 elements share, in the order of a parameter's
// memory. Codes count the floats of 3 bits after the leading one, 8 from each power of two to the next, and
// code 0 is the scale: code 255 is almost 2^32 times as much. What lies between two of them becomes either at
// random, with its mean where it was, for a decaying mean that is rounded to nearest stands still.
struct Moment8 {
  using Word = std::uint8_t;
  static constexpr bool kShares = true;
  static constexpr std::int64_t kBlock = 128;
  static constexpr int kCut = 20;  // bits of a float that a code has not
  static constexpr std::uint32_t kHalf = 1u << 31;

  SCHEDULEFREE_INLINE float decoded(std::uint8_t code, float scale) {
    return bit_cast<float>((static_cast<std::uint32_t>(code) << kCut) + bit_cast<std::uint32_t>(scale));
  }

  // A mean square, which is not negative, as an integer that orders them as the floats do. What is beyond the
  // largest finite code, infinities and NaNs too, is that code: it decays, and with it the scale of its
  // block.
  SCHEDULEFREE_INLINE std::uint32_t order(float v) {
    constexpr std::uint32_t kMost = 0x7F800000u - (1u << kCut);
    const std::uint32_t bits = bit_cast<std::uint32_t>(v);
    return bits < kMost ? bits : kMost;
  }

  // The scale of values of which this is the largest: code 255 is the first that is not less. Zeros
  // alone have scale 0.
  SCHEDULEFREE_INLINE float scale(std::uint32_t largest) {
    const std::uint32_t most = (largest + ((1u << kCut) - 1)) >> kCut;
    return bit_cast<float>((most > 255 ? most - 255 : most > 0 ? 1u : 0u) << kCut);
  }

  // Takes the upper kCut of 32 random bits, for which kHalf rounds to nearest. What is less than the scale
  // becomes the scale.
  SCHEDULEFREE_INLINE std::uint8_t encoded(float v, float scale, std::uint32_t random) {
    const auto code = static_cast<std::int32_t>((order(v) + (random >> (32 - kCut))) >> kCut) -
                      static_cast<std::int32_t>(bit_cast<std::uint32_t>(scale) >> kCut);
    return static_cast<std::uint8_t>(code > 0 ? code : 0);
  }
};

}  // namespace schedulefree
