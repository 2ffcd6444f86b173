// Activations of the conv family and their derivatives on vectors. NaN passes through all of them.
#pragma once

#include <math.h>

#include "conv/cpu/params.h"
#include "core/cpu/vec_math.h"

namespace fusednn::cpu::FUSEDNN_ISA {

FUSEDNN_INLINE float erf_of(float x) { return ::erff(x); }
FUSEDNN_INLINE double erf_of(double x) { return ::erf(x); }

template <class T>
FUSEDNN_INLINE Vec<T> erf(Vec<T> x) {
  T lanes[Vec<T>::size];
  x.store(lanes);
  for (int i = 0; i < Vec<T>::size; ++i) lanes[i] = erf_of(lanes[i]);
  return Vec<T>::load(lanes);
}

template <class T>
FUSEDNN_INLINE Vec<T> clamp(Vec<T> x, T low, T high) {
  const Vec<T> l(low), h(high);
  x = select(x < l, l, x);
  return select(x > h, h, x);
}

template <class T>
FUSEDNN_INLINE Vec<T> normal_cdf(Vec<T> x) {
  using V = Vec<T>;
  return V(T(0.5)) * (V(T(1)) + erf(x * V(T(0.70710678118654752))));
}

constexpr double kGeluScale = 0.79788456080286536;  // sqrt(2 / pi)
constexpr double kGeluCube = 0.044715;

template <class T>
FUSEDNN_INLINE Vec<T> gelu_tanh_inner(Vec<T> x) {
  using V = Vec<T>;
  return tanh(V(T(kGeluScale)) * (x + V(T(kGeluCube)) * x * x * x));
}

template <Activation A, class T>
FUSEDNN_INLINE Vec<T> activate(Vec<T> x) {
  using V = Vec<T>;
  const V zero(T(0)), half(T(0.5)), one(T(1));
  if constexpr (A == Activation::relu) return select(x < zero, zero, x);
  if constexpr (A == Activation::relu6) return clamp(x, T(0), T(6));
  if constexpr (A == Activation::silu) return x * sigmoid(x);
  if constexpr (A == Activation::hardswish) return x * clamp(x + V(T(3)), T(0), T(6)) * V(T(1) / 6);
  if constexpr (A == Activation::gelu) return x * normal_cdf(x);
  if constexpr (A == Activation::gelu_tanh) return half * x * (one + gelu_tanh_inner(x));
  return x;
}

// The derivative of a smooth activation, and of hardswish, at x; at kinks, torch's.
template <Activation A, class T>
FUSEDNN_INLINE Vec<T> derivative(Vec<T> x) {
  using V = Vec<T>;
  const V zero(T(0)), half(T(0.5)), one(T(1));
  if constexpr (A == Activation::silu) {
    const V s = sigmoid(x);
    return s * (one + x * (one - s));
  }
  if constexpr (A == Activation::hardswish) {
    const V slope = x * V(T(1) / 3) + half;
    return select(x.v <= V(T(-3)).v, zero, select(x.v >= V(T(3)).v, one, slope));
  }
  if constexpr (A == Activation::gelu) {
    const V density = exp(zero - half * x * x) * V(T(0.39894228040143268));
    return normal_cdf(x) + x * density;
  }
  if constexpr (A == Activation::gelu_tanh) {
    const V t = gelu_tanh_inner(x);
    const V inner = V(T(kGeluScale)) * (one + V(T(3 * kGeluCube)) * x * x);
    return half * (one + t) + half * x * (one - t * t) * inner;
  }
  return one;
}

// grad times the derivative at x; where that is zero, whatever the gradient is.
template <Activation A, class T>
FUSEDNN_INLINE Vec<T> chain(Vec<T> x, Vec<T> grad) {
  using V = Vec<T>;
  const V zero(T(0));
  if constexpr (A == Activation::none) return grad;
  if constexpr (A == Activation::relu) return select(x.v <= zero.v, zero, grad);
  if constexpr (A == Activation::relu6) return select((x.v <= zero.v) | (x.v >= V(T(6)).v), zero, grad);
  return grad * derivative<A>(x);
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
