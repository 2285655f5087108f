// What the device sources need of the C++ library, which NVRTC does not have. It stands for each of its
// headers.
#pragma once

using size_t = decltype(sizeof(0));

namespace std {

using ::size_t;
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;

template <typename A, typename B>
inline constexpr bool is_same_v = false;
template <typename A>
inline constexpr bool is_same_v<A, A> = true;

using ::expm1;
using ::fma;
using ::log;
using ::pow;
using ::sqrt;

}  // namespace std

#define DBL_MAX 1.7976931348623157e308

#define __builtin_fma fma
#define __builtin_fmaf fmaf
#define __builtin_sqrt sqrt
#define __builtin_sqrtf sqrtf
