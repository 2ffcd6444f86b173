// Sixteen-bit floating point, rounded to nearest even, once, from float or double.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>
#include <type_traits>

namespace cuda_on_cpu {

template <int ExponentBits, int MantissaBits>
struct Format {
  static constexpr int mantissa = MantissaBits;
  static constexpr int bias = (1 << (ExponentBits - 1)) - 1;
  static constexpr unsigned infinity = ((1u << ExponentBits) - 1u) << MantissaBits;
};

using HalfFormat = Format<5, 10>;
using BfloatFormat = Format<8, 7>;

template <class F>
constexpr uint16_t encode(double x) {
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const auto sign = static_cast<unsigned>(bits >> 63) << 15;
  if (x != x) return 0x7fff;
  const int exponent = static_cast<int>((bits >> 52) & 0x7ff) - 1023;
  if (exponent > F::bias) return static_cast<uint16_t>(sign | F::infinity);
  const int below = 1 - F::bias - exponent;  // how far below the least normal number
  const int shift = 52 - F::mantissa + (below > 0 ? below : 0);
  if (shift > 54 || exponent == -1023) return static_cast<uint16_t>(sign);
  const uint64_t significand = (bits & ((uint64_t{1} << 52) - 1)) | uint64_t{1} << 52;
  uint64_t kept = significand >> shift;
  const uint64_t rest = significand & ((uint64_t{1} << shift) - 1);
  const uint64_t tie = uint64_t{1} << (shift - 1);
  if (rest > tie || (rest == tie && (kept & 1) != 0)) ++kept;
  // A carry moves into the exponent, up to infinity, by itself.
  const int stored = below > 0 ? 0 : exponent + F::bias - 1;
  return static_cast<uint16_t>(
      sign | ((static_cast<unsigned>(stored) << F::mantissa) + static_cast<unsigned>(kept)));
}

template <class F>
constexpr float decode(uint16_t bits) {
  const unsigned sign = (bits & 0x8000u) << 16;
  const unsigned magnitude = bits & 0x7fffu;
  const unsigned fraction = magnitude & ((1u << F::mantissa) - 1u);
  const int exponent = static_cast<int>(magnitude >> F::mantissa);
  if (magnitude >= F::infinity)
    return std::bit_cast<float>(sign | 0x7f800000u | fraction << (23 - F::mantissa));
  if (exponent == 0) {
    const float value =
        static_cast<float>(__builtin_ldexp(static_cast<double>(fraction), 1 - F::bias - F::mantissa));
    return sign != 0 ? -value : value;
  }
  return std::bit_cast<float>(sign | static_cast<unsigned>(exponent - F::bias + 127) << 23 |
                              fraction << (23 - F::mantissa));
}

template <class F>
struct SmallFloat {
  uint16_t bits;

  SmallFloat() = default;
  template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
  constexpr SmallFloat(T x) : bits(encode<F>(static_cast<double>(x))) {}
  constexpr operator float() const { return decode<F>(bits); }

  static constexpr SmallFloat from_bits(uint16_t bits) {
    SmallFloat value{};
    value.bits = bits;
    return value;
  }
};

template <class F>
struct alignas(4) SmallFloat2 {
  SmallFloat<F> x, y;
};

// A float holds the exact sum or product closely enough that rounding twice is rounding once.
#define CUDA_ON_CPU_ARITHMETIC(op, name)                                          \
  template <class F>                                                              \
  constexpr SmallFloat<F> operator op(SmallFloat<F> a, SmallFloat<F> b) {         \
    return static_cast<float>(a) op static_cast<float>(b);                        \
  }                                                                               \
  template <class F>                                                              \
  constexpr SmallFloat2<F> operator op(SmallFloat2<F> a, SmallFloat2<F> b) {      \
    return {a.x op b.x, a.y op b.y};                                              \
  }                                                                               \
  template <class F>                                                              \
  constexpr SmallFloat<F>& operator op## = (SmallFloat<F> & a, SmallFloat<F> b) { \
    return a = a op b;                                                            \
  }                                                                               \
  template <class F>                                                              \
  constexpr SmallFloat<F> name(SmallFloat<F> a, SmallFloat<F> b) {                \
    return a op b;                                                                \
  }                                                                               \
  template <class F>                                                              \
  constexpr SmallFloat2<F> name##2(SmallFloat2<F> a, SmallFloat2<F> b) {          \
    return a op b;                                                                \
  }
CUDA_ON_CPU_ARITHMETIC(+, __hadd)
CUDA_ON_CPU_ARITHMETIC(-, __hsub)
CUDA_ON_CPU_ARITHMETIC(*, __hmul)
CUDA_ON_CPU_ARITHMETIC(/, __hdiv)
#undef CUDA_ON_CPU_ARITHMETIC

template <class F>
constexpr SmallFloat<F> operator-(SmallFloat<F> a) {
  return SmallFloat<F>::from_bits(static_cast<uint16_t>(a.bits ^ 0x8000u));
}
template <class F>
constexpr SmallFloat<F> __hneg(SmallFloat<F> a) {
  return -a;
}
template <class F>
constexpr SmallFloat<F> __habs(SmallFloat<F> a) {
  return SmallFloat<F>::from_bits(static_cast<uint16_t>(a.bits & 0x7fffu));
}
// In double, since a float would lose bits of the product before the sum is rounded.
template <class F>
SmallFloat<F> __hfma(SmallFloat<F> a, SmallFloat<F> b, SmallFloat<F> c) {
  return ::fma(static_cast<double>(float(a)), static_cast<double>(float(b)), static_cast<double>(float(c)));
}
template <class F>
SmallFloat2<F> __hfma2(SmallFloat2<F> a, SmallFloat2<F> b, SmallFloat2<F> c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
template <class F>
SmallFloat<F> __hmax(SmallFloat<F> a, SmallFloat<F> b) {
  return ::fmaxf(a, b);
}
template <class F>
SmallFloat<F> __hmin(SmallFloat<F> a, SmallFloat<F> b) {
  return ::fminf(a, b);
}
template <class F>
constexpr bool __hisnan(SmallFloat<F> a) {
  return (a.bits & 0x7fffu) > F::infinity;
}
template <class F>
constexpr float __low2float(SmallFloat2<F> a) {
  return a.x;
}
template <class F>
constexpr float __high2float(SmallFloat2<F> a) {
  return a.y;
}

}  // namespace cuda_on_cpu
