// Device functions that the host's math.h lacks. The fast ones (__expf) are as exact as the host's: tests
// must not rely on their error, only on their meaning.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>
#include <type_traits>

namespace cuda_on_cpu {

inline float fast_exp(float x) { return ::expf(x); }
inline float fast_exp10(float x) { return static_cast<float>(::pow(10.0, static_cast<double>(x))); }
inline float fast_log(float x) { return ::logf(x); }
inline float fast_log2(float x) { return ::log2f(x); }
inline float fast_log10(float x) { return ::log10f(x); }
inline float fast_pow(float x, float y) { return ::powf(x, y); }
inline float fast_sin(float x) { return ::sinf(x); }
inline float fast_cos(float x) { return ::cosf(x); }
inline float fast_tan(float x) { return ::tanf(x); }

template <class T>
using Number = std::enable_if_t<std::is_arithmetic_v<T>, T>;

// Saturates as the hardware does; NaN becomes 0.
template <class Integer>
Integer to_integer(double rounded) {
  constexpr double low =
      static_cast<double>(std::is_signed_v<Integer> ? -(double(1ull << (sizeof(Integer) * 8 - 1))) : 0);
  constexpr double high = std::is_signed_v<Integer> ? double(1ull << (sizeof(Integer) * 8 - 1))
                                                    : 2.0 * double(1ull << (sizeof(Integer) * 8 - 1));
  if (rounded != rounded) return 0;
  if (rounded <= low) return static_cast<Integer>(low);
  if (rounded >= high)
    return static_cast<Integer>(
        ~(std::is_signed_v<Integer> ? Integer(1) << (sizeof(Integer) * 8 - 1) : Integer(0)));
  return static_cast<Integer>(rounded);
}

}  // namespace cuda_on_cpu

// Macros, since the C library reserves these names for itself.
#define __expf(x) ::cuda_on_cpu::fast_exp(x)
#define __exp10f(x) ::cuda_on_cpu::fast_exp10(x)
#define __logf(x) ::cuda_on_cpu::fast_log(x)
#define __log2f(x) ::cuda_on_cpu::fast_log2(x)
#define __log10f(x) ::cuda_on_cpu::fast_log10(x)
#define __powf(x, y) ::cuda_on_cpu::fast_pow(x, y)
#define __sinf(x) ::cuda_on_cpu::fast_sin(x)
#define __cosf(x) ::cuda_on_cpu::fast_cos(x)
#define __tanf(x) ::cuda_on_cpu::fast_tan(x)

template <class A, class B>
constexpr std::common_type_t<cuda_on_cpu::Number<A>, cuda_on_cpu::Number<B>> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return ::fmin(C(a), C(b));
  return C(b) < C(a) ? C(b) : C(a);
}
template <class A, class B>
constexpr std::common_type_t<cuda_on_cpu::Number<A>, cuda_on_cpu::Number<B>> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return ::fmax(C(a), C(b));
  return C(a) < C(b) ? C(b) : C(a);
}

inline float rsqrtf(float x) { return static_cast<float>(1.0 / ::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / ::sqrt(x); }
inline float fdividef(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fsqrt_rn(float x) { return ::sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

inline int __float2int_rn(float x) { return cuda_on_cpu::to_integer<int>(::nearbyint(x)); }
inline int __float2int_rz(float x) { return cuda_on_cpu::to_integer<int>(::trunc(x)); }
inline int __float2int_rd(float x) { return cuda_on_cpu::to_integer<int>(::floor(x)); }
inline int __float2int_ru(float x) { return cuda_on_cpu::to_integer<int>(::ceil(x)); }
inline unsigned __float2uint_rn(float x) { return cuda_on_cpu::to_integer<unsigned>(::nearbyint(x)); }
inline unsigned __float2uint_rz(float x) { return cuda_on_cpu::to_integer<unsigned>(::trunc(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= ((x >> i) & 1u) << (31 - i);
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>((int64_t{a} * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31u)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31u));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i);
    const auto byte = static_cast<unsigned>(bytes >> (8 * (pick & 7u))) & 0xffu;
    result |= ((pick & 8u) != 0 ? (byte >> 7) * 0xffu : byte) << (8 * i);
  }
  return result;
}
