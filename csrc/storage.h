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
//   kStochastic              whether stochastic() is there: rounded() up or down at random
//
// NaNs are made canonical, for a payload could round to infinity.
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
  const std::uint32_t magnitude = h & 0x7FFFu;
  // Normal numbers and infinities: move the fields and rebias. Multiplying by 2^112 rebias exactly;
  // the exponent 31 of infinities and NaNs is raised to 255 by hand.
  const float scaled = bit_cast<float>(magnitude << 13) * bit_cast<float>(0x77800000u);
  const std::uint32_t special = magnitude >= 0x7C00u ? 0x7F800000u : 0u;
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

// Choices by masks, where a choice by comparison would keep GCC from vectorising a loop.

// All ones where a < b, which are less than 2^31; otherwise 0.
SCHEDULEFREE_INLINE std::uint32_t below(std::uint32_t a, std::uint32_t b) { return 0 - ((a - b) >> 31); }

SCHEDULEFREE_INLINE std::uint32_t chosen(std::uint32_t mask, std::uint32_t a, std::uint32_t b) {
  return (a & mask) | (b & ~mask);
}

// ---- formats ---------------------------------------------------------------------------------------

template <typename Real_>
struct Whole {
  using Real = Real_;
  using Word = Real_;
  using Low = std::int16_t;
  using State = Whole;
  static constexpr bool kHasLow = false;
  static constexpr bool kStochastic = false;

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

  SCHEDULEFREE_INLINE float widen(Word word, Low low) {
    return bit_cast<float>((static_cast<std::uint32_t>(word) << 16) +
                           static_cast<std::uint32_t>(static_cast<std::int32_t>(low)));
  }
  SCHEDULEFREE_INLINE void narrow(float x, Word& word, Low& low) {
    std::uint32_t bits = bit_cast<std::uint32_t>(x);
    bits = (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : bits;
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

  SCHEDULEFREE_INLINE float widen(Word word, Low low) {
    const std::uint32_t magnitude = word & 0x7FFFu;
    // Word and low half are one number, which counts as the bits of a float do, from 2^-14 on.
    const std::int32_t count = static_cast<std::int32_t>(magnitude << 16) + low;
    const std::uint32_t normal = (static_cast<std::uint32_t>(count) >> 3) + 0x38000000u;
    const std::uint32_t small =
        bit_cast<std::uint32_t>(static_cast<float>(count) * bit_cast<float>(0x2B800000u));  // 2^-40
    const std::uint32_t special = magnitude > 0x7C00u ? 0x7FC00000u : 0x7F800000u;
    std::uint32_t bits = count < 0x04000000 ? small : normal;
    bits = magnitude >= 0x7C00u ? special : bits;
    return bit_cast<float>(bits | static_cast<std::uint32_t>(word & 0x8000u) << 16);
  }
  SCHEDULEFREE_INLINE void narrow(float x, Word& word, Low& low) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    const std::uint32_t is_small = below(magnitude, 0x38800000u), is_finite = below(magnitude, 0x7F800000u);
    const float scaled = bit_cast<float>(magnitude & is_small) * bit_cast<float>(0x53800000u);
    const auto small = static_cast<std::uint32_t>(static_cast<std::int32_t>(scaled));  // times 2^40, whole
    const std::uint32_t count = chosen(is_small, small, (magnitude - 0x38000000u) << 3);
    const std::uint32_t special = 0x7C00u | (below(0x7F800000u, magnitude) & 0x0200u);
    word = static_cast<Word>(chosen(is_finite, (count + 0x8000u) >> 16, special) | ((bits >> 16) & 0x8000u));
    low = static_cast<Low>(static_cast<std::uint16_t>(count & is_finite));
  }
  SCHEDULEFREE_INLINE float rounded(float x) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu, sign = bits & 0x80000000u;
    // Adding 2^23 to a number below it rounds to an integer.
    const float count =
        bit_cast<float>(magnitude < 0x37000000u ? magnitude : 0u) * bit_cast<float>(0x53800000u);
    const float whole = (count + bit_cast<float>(0x4B000000u)) - bit_cast<float>(0x4B000000u);
    const std::uint32_t small = bit_cast<std::uint32_t>(whole * bit_cast<float>(0x2B800000u));
    std::uint32_t result = magnitude < 0x37000000u ? small : magnitude;
    result = magnitude >= 0x477FF000u && magnitude < 0x7F800000u ? 0x7F800000u : result;  // 65520
    return bit_cast<float>(result | sign);
  }
  SCHEDULEFREE_INLINE float rounded(double x) {
    // To float, but below 2^-17 to a multiple of 2^-40: adding 1.5 * 2^12 to a double leaves those.
    const double magic = bit_cast<double>(std::uint64_t{0x40B8000000000000u});
    const double whole = (x + magic) - magic;
    const bool small = (bit_cast<std::uint64_t>(x) & 0x7FFFFFFFFFFFFFFFu) < 0x3EE0000000000000u;
    const float result = static_cast<float>(small ? whole : x);
    // The sum of opposite numbers is +0.
    const auto sign = static_cast<std::uint32_t>(bit_cast<std::uint64_t>(x) >> 32) & 0x80000000u;
    return rounded(bit_cast<float>((bit_cast<std::uint32_t>(result) & 0x7FFFFFFFu) | sign));
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

  SCHEDULEFREE_INLINE float widen(Word word, Low low) {
    return bit_cast<float>((static_cast<std::uint32_t>(word) << 16) +
                           (static_cast<std::uint32_t>(static_cast<std::int32_t>(low)) << 8));
  }
  SCHEDULEFREE_INLINE void narrow(float x, Word& word, Low& low) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    word = static_cast<Word>((bits + 0x8000u) >> 16);
    low = static_cast<Low>(static_cast<std::uint8_t>(bits >> 8));
  }
  SCHEDULEFREE_INLINE float rounded(float x) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const std::uint32_t nearest = (bits + 0x7Fu + ((bits >> 8) & 1u)) & 0xFFFFFF00u;
    return bit_cast<float>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC00000u : nearest);
  }
  SCHEDULEFREE_INLINE float rounded(double x) {
    const std::uint64_t bits = bit_cast<std::uint64_t>(x), magnitude = bits & 0x7FFFFFFFFFFFFFFFu;
    const std::uint64_t nearest = (bits + 0xFFFFFFFFFu + ((bits >> 37) & 1u)) & ~std::uint64_t{0x1FFFFFFFFF};
    // Below 2^-126 to a multiple of 2^-141: adding 1.5 * 2^-89 to a double leaves those.
    const double magic = bit_cast<double>(std::uint64_t{0x3A68000000000000u});
    const double whole = (x + magic) - magic;
    const double result = magnitude < 0x3810000000000000u ? whole : bit_cast<double>(nearest);
    const auto sign = static_cast<std::uint32_t>(bits >> 32) & 0x80000000u;  // opposite numbers add up to +0
    const std::uint32_t narrow = (bit_cast<std::uint32_t>(static_cast<float>(result)) & 0x7FFFFFFFu) | sign;
    return bit_cast<float>(magnitude > 0x7FF0000000000000u ? 0x7FC00000u : narrow);
  }
  // Up with the probability of what is cut off. `random` has 8 bits.
  SCHEDULEFREE_INLINE float stochastic(float x, std::uint32_t random) {
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const std::uint32_t result = (bits + random) & 0xFFFFFF00u;
    return bit_cast<float>((bits & 0x7FFFFFFFu) >= 0x7F800000u ? bits : result);
  }
};

// ---- random numbers --------------------------------------------------------------------------------

// A permutation of 32 bits without visible pattern (C. Wellons, "Prospecting for hash functions", lowbias32).
SCHEDULEFREE_INLINE std::uint32_t scrambled(std::uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// 32 random bits of element begin + i of a parameter, counted in the order of its memory, in the step with
// this key: they depend on nothing else. The element has the upper 32 bits of begin, so that loops over i
// have 32 bits. The upper 16 belong to the second moment, 8 to z and the lowest 8 to y.
SCHEDULEFREE_INLINE std::uint32_t random_bits(std::uint32_t key, std::int64_t begin, std::uint32_t i = 0) {
  const auto low = static_cast<std::uint32_t>(begin), high = static_cast<std::uint32_t>(begin >> 32);
  return scrambled(((low + i) ^ key) + high * 0x9E3779B9u);
}

// Rounds what a step has made of an element of a parameter of format Y; where that is at random, by `random`.
template <typename Y, bool at_random>
SCHEDULEFREE_INLINE void round_update(typename Y::Real& y, typename Y::Real& z, std::uint32_t random) {
  if constexpr (at_random) {
    y = Y::stochastic(y, random & 0xFFu);
    z = Y::State::stochastic(z, random >> 8 & 0xFFu);
  }
  y = Y::rounded(y);
  z = Y::State::rounded(z);
}

// ---- a second moment of 8 bits ---------------------------------------------------------------------

// A mean square as a code of 8 bits and a scale that 128 elements share, in the order of a parameter's
// memory: scale * (code / 255)^4. Codes are equally far apart in the square root of what the step divides by.
// What lies between two of them becomes either at random, for a decaying mean that is rounded to nearest
// stands still.
struct Moment8 {
  using Word = std::uint8_t;
  static constexpr std::int64_t kBlock = 128;

  SCHEDULEFREE_INLINE float decoded(std::uint8_t code, float scale) {
    const float root = static_cast<float>(code) * (1.0f / 255.0f);
    const float square = root * root;
    return scale * (square * square);
  }

  // The larger of a block's values as integers, which order them as the floats do, and its scale.
  SCHEDULEFREE_INLINE std::uint32_t order(float v) { return bit_cast<std::uint32_t>(v); }
  SCHEDULEFREE_INLINE float scale(std::uint32_t largest) {
    const std::uint32_t least = largest < 0x00800000u ? 0x00800000u : largest;  // whose reciprocal is finite
    return bit_cast<float>(largest == 0 ? 0u : least > 0x7F7FFFFFu ? 0x7F7FFFFFu : least);
  }

  // `inverse` is 1 / scale, or 0; `random` has 16 bits. Only 0 becomes 0.
  SCHEDULEFREE_INLINE std::uint8_t encoded(float v, float inverse, std::uint32_t random) {
    const float dither = (static_cast<float>(static_cast<std::int32_t>(random)) + 0.5f) * 0x1p-16f;
    const float place = square_root(square_root(v * inverse)) * 255.0f + dither;
    // As integers, which order numbers that are not negative as the floats do, and NaNs behind all of them.
    const std::uint32_t bits = bit_cast<std::uint32_t>(place), most = bit_cast<std::uint32_t>(255.0f);
    const auto code =
        static_cast<std::uint32_t>(static_cast<std::int32_t>(bit_cast<float>(bits < most ? bits : most)));
    const std::uint32_t least = ((bit_cast<std::uint32_t>(v) & 0x7FFFFFFFu) + 0x7FFFFFFFu) >> 31;  // v != 0
    return static_cast<std::uint8_t>(code > least ? code : least);
  }
};

}  // namespace schedulefree
