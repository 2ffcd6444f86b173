// Scalar activations of the convolutions and their derivatives, for CUDA threads. Kinks and NaN are torch's:
// NaN stays NaN, the derivative at a kink is that of the flat side.
//
//   silu        z s                 s = 1 / (1 + exp(-z))
//   hardswish   z min(max(z + 3, 0), 6) / 6
//   gelu        z Phi(z)            Phi = (1 + erf(z / sqrt 2)) / 2        (Hendrycks & Gimpel 2016)
//   gelu_tanh   z (1 + tanh(k (z + 0.044715 z^3))) / 2                     k = sqrt(2 / pi)
#pragma once

#include "core/activation.h"
#include "core/activations.h"
#include "core/macros.h"

namespace fusednn::math {

FUSEDNN_HOST_DEVICE float erf(float x) { return ::erff(x); }
FUSEDNN_HOST_DEVICE double erf(double x) { return ::erf(x); }

template <class A>
FUSEDNN_HOST_DEVICE A normal_cdf(A z) {
  return A(0.5) * (A(1) + erf(z * A(0.70710678118654752440)));
}

template <class A>
FUSEDNN_HOST_DEVICE A gelu_tanh_factor(A z) {
  return tanh(A(0.79788456080286535588) * (z + A(0.044715) * z * z * z));
}

template <class A>
FUSEDNN_HOST_DEVICE A activated(Activation activation, A z) {
  switch (activation) {
    case Activation::none:
      break;
    case Activation::relu:
      return z < A(0) ? A(0) : z;
    case Activation::relu6:
      return z < A(0) ? A(0) : (z > A(6) ? A(6) : z);
    case Activation::silu:
      return z * sigmoid(z);
    case Activation::hardswish:
      return z * (z < A(-3) ? A(0) : (z > A(3) ? A(6) : z + A(3))) * (A(1) / A(6));
    case Activation::gelu:
      return z * normal_cdf(z);
    case Activation::gelu_tanh:
      return A(0.5) * z * (A(1) + gelu_tanh_factor(z));
  }
  return z;
}

// d, the gradient of activated(z), taken back to z.
template <class A>
FUSEDNN_HOST_DEVICE A activation_gradient(Activation activation, A d, A z) {
  switch (activation) {
    case Activation::none:
      break;
    case Activation::relu:
      return z <= A(0) ? A(0) : d;
    case Activation::relu6:
      return z <= A(0) || z >= A(6) ? A(0) : d;
    case Activation::silu: {
      const A s = sigmoid(z);
      return d * s * (A(1) + z * (A(1) - s));
    }
    case Activation::hardswish:
      return z <= A(-3) ? A(0) : (z < A(3) ? d * (z * (A(1) / A(3)) + A(0.5)) : d);
    case Activation::gelu: {
      const A density = A(0.39894228040143267794) * exp(A(-0.5) * z * z);
      return d * (normal_cdf(z) + z * density);
    }
    case Activation::gelu_tanh: {
      const A t = gelu_tanh_factor(z);
      const A slope = A(0.79788456080286535588) * (A(1) + A(3 * 0.044715) * z * z);
      return d * A(0.5) * (A(1) + t + z * (A(1) - t * t) * slope);
    }
  }
  return d;
}

}  // namespace fusednn::math
