// Scalar activations for CUDA threads and for the scalar tails of tests.
//
// sigmoid works on exp(-|x|), which never overflows, so both ends keep their relative accuracy:
//   x >= 0: 1 / (1 + e)        x < 0: e / (1 + e),   e = exp(-|x|)
#pragma once

#include <cmath>

#include "core/macros.h"

namespace fusednn::math {

FUSEDNN_HOST_DEVICE float exp(float x) { return ::expf(x); }
FUSEDNN_HOST_DEVICE double exp(double x) { return ::exp(x); }
FUSEDNN_HOST_DEVICE float log(float x) { return ::logf(x); }
FUSEDNN_HOST_DEVICE double log(double x) { return ::log(x); }
FUSEDNN_HOST_DEVICE float tanh(float x) { return ::tanhf(x); }
FUSEDNN_HOST_DEVICE double tanh(double x) { return ::tanh(x); }

template <class A>
FUSEDNN_HOST_DEVICE A sigmoid(A x) {
  const A e = exp(x < A(0) ? x : -x);
  return (x < A(0) ? e : A(1)) / (A(1) + e);
}

}  // namespace fusednn::math
