// exp, tanh and sigmoid on vectors of float and double.
//
//   exp      x = n ln2 + r, |r| <= ln2 / 2:  2^n (1 + r + r^2 Q(r)); Q from tools/minimax.py
//   tanh     t / (t + 2), t = expm1(2 |x|), which keeps the relative accuracy at 0; the sign is copied
//   sigmoid  1 / (1 + e) or e / (1 + e), e = exp(-|x|), which never overflows
//
// Largest error, which tests/test_vector_math.py sweeps against float64 and 80-digit references:
// exp 1.5 ulp, tanh 3 ulp, sigmoid 3 ulp (found: 1.1, 2.5, 2.5). NaN stays NaN; infinities and subnormal
// results are right.
#pragma once

#include "core/cpu/vec.h"

namespace fusednn::cpu::FUSEDNN_ISA {

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float log2e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f;  // 9 significant bits: n * ln2_high is exact
  static constexpr float ln2_low = -2.12194440e-4f;
  static constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float highest = 100.f, lowest = -110.f;  // beyond: inf and 0 all the same
  static constexpr float tanh_highest = 20.f;               // 2 |x| beyond which tanh is 1
  static constexpr int mantissa = 23, bias = 127;
  static constexpr int degree = 4;
  static constexpr float q[] = {0.5000000027f, 0.1666657701f, 0.04166637525f, 0.008363175255f,
                                0.001394111366f};
};

template <>
struct ExpConstants<double> {
  static constexpr double log2e = 1.4426950408889634;
  static constexpr double ln2_high = 0.69314718036912382;  // 32 significant bits
  static constexpr double ln2_low = 1.9082149292705877e-10;
  static constexpr double round = 6755399441055744.;  // 1.5 * 2^52
  static constexpr double highest = 720., lowest = -760.;
  static constexpr double tanh_highest = 40.;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr int degree = 9;
  static constexpr double q[] = {0.5000000000000001021,     0.1666666666666667452,   0.04166666666662415789,
                                 0.008333333333322217661,   0.00138888889171983846,  0.0001984126988655908063,
                                 0.00002480152132016129765, 2.755724237300625454e-6, 2.762007679598290815e-7,
                                 2.511003614718777098e-8};
};

template <class T>
struct ExpParts {
  typename Vec<T>::NativeInt n;
  Vec<T> r, r2q;  // exp(x) = 2^n (1 + r + r2q)
};

template <class T>
FUSEDNN_INLINE ExpParts<T> exp_parts(Vec<T> x) {
  using C = ExpConstants<T>;
  using V = Vec<T>;
  const V shifted = x * V(C::log2e) + V(C::round);
  const V n = shifted - V(C::round);
  const V r = (x - n * V(C::ln2_high)) - n * V(C::ln2_low);
  V q(C::q[C::degree]);
  for (int i = C::degree - 1; i >= 0; --i) q = q * r + V(C::q[i]);
  return {shifted.bits() - V(C::round).bits(), r, r * r * q};
}

template <class T>
FUSEDNN_INLINE Vec<T> power_of_two(typename Vec<T>::NativeInt n) {
  using C = ExpConstants<T>;
  return Vec<T>((typename Vec<T>::Native)((n + C::bias) << C::mantissa));
}

template <class T>
FUSEDNN_INLINE Vec<T> exp(Vec<T> x) {
  using C = ExpConstants<T>;
  using V = Vec<T>;
  x = select(x > V(C::highest), V(C::highest), x);
  x = select(x < V(C::lowest), V(C::lowest), x);
  const ExpParts<T> e = exp_parts(x);
  const auto half = e.n >> 1;  // in two steps, since n leaves the exponent's range at both ends
  return (V(T(1)) + (e.r + e.r2q)) * power_of_two<T>(half) * power_of_two<T>(e.n - half);
}

template <class T>
FUSEDNN_INLINE Vec<T> sign_of(Vec<T> x) {
  return x & Vec<T>(T(-0.0));
}

template <class T>
FUSEDNN_INLINE Vec<T> abs(Vec<T> x) {
  return Vec<T>((typename Vec<T>::Native)(x.bits() & ~Vec<T>(T(-0.0)).bits()));
}

template <class T>
FUSEDNN_INLINE Vec<T> tanh(Vec<T> x) {
  using C = ExpConstants<T>;
  using V = Vec<T>;
  V a = abs(x);
  a = a + a;
  a = select(a > V(C::tanh_highest), V(C::tanh_highest), a);
  const ExpParts<T> e = exp_parts(a);
  const V scale = power_of_two<T>(e.n);
  const V t = scale * (e.r + e.r2q) + (scale - V(T(1)));
  return t / (t + V(T(2))) | sign_of(x);
}

template <class T>
FUSEDNN_INLINE Vec<T> sigmoid(Vec<T> x) {
  using V = Vec<T>;
  const V one(T(1));
  const V e = exp(abs(x) | V(T(-0.0)));
  return select(x < V(T(0)), e, one) / (one + e);
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
