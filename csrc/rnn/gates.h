// The pointwise half of an LSTM and a GRU step, forward and backward.
//
// A is float or double in a CUDA thread and a SIMD vector on the CPU; `sigmoid` and `tanh` are found by
// argument-dependent lookup there and in fusednn::math for scalars.
//
//   LSTM  i, f, o = sigmoid(.)   g = tanh(.)   c' = f c + i g            h' = o tanh(c')
//   GRU   r, z = sigmoid(.)      n = tanh(x_n + r h_n)                   h' = n + z (h - n)
//
// (h_n includes its bias b_hn: the reset gate multiplies both, as in torch.nn.GRUCell.)
#pragma once

#include "core/activations.h"
#include "core/macros.h"

namespace fusednn::math {

template <class A>
struct LstmStep {
  A i, f, g, o;  // activated gates
  A c, h;
};

template <class A>
FUSEDNN_HOST_DEVICE LstmStep<A> lstm_forward(A i, A f, A g, A o, A c_prev) {
  LstmStep<A> s;
  s.i = sigmoid(i);
  s.f = sigmoid(f);
  s.g = tanh(g);
  s.o = sigmoid(o);
  s.c = s.f * c_prev + s.i * s.g;
  s.h = s.o * tanh(s.c);
  return s;
}

template <class A>
struct LstmGradients {
  A i, f, g, o;  // with respect to the gates before activation
  A c_prev;
};

// i, f, g, o are the activated gates; tanh(c) is computed again rather than saved.
template <class A>
FUSEDNN_HOST_DEVICE LstmGradients<A> lstm_backward(A grad_h, A grad_c, A i, A f, A g, A o, A c_prev, A c) {
  const A one = A(1);
  const A tanh_c = tanh(c);
  const A d_c = grad_c + grad_h * o * (one - tanh_c * tanh_c);
  LstmGradients<A> d;
  d.i = d_c * g * i * (one - i);
  d.f = d_c * c_prev * f * (one - f);
  d.g = d_c * i * (one - g * g);
  d.o = grad_h * tanh_c * o * (one - o);
  d.c_prev = d_c * f;
  return d;
}

template <class A>
struct GruStep {
  A r, z, n, h;
};

template <class A>
FUSEDNN_HOST_DEVICE GruStep<A> gru_forward(A r, A z, A x_n, A h_n, A h_prev) {
  GruStep<A> s;
  s.r = sigmoid(r);
  s.z = sigmoid(z);
  s.n = tanh(x_n + s.r * h_n);
  s.h = s.n + s.z * (h_prev - s.n);
  return s;
}

template <class A>
struct GruGradients {
  A r, z;    // before activation, shared by the input and the hidden product
  A x_n;     // of the input product's n
  A h_n;     // of the hidden product's n
  A h_prev;  // the direct term only; the product with weight_hh adds the rest
};

template <class A>
FUSEDNN_HOST_DEVICE GruGradients<A> gru_backward(A grad_h, A r, A z, A n, A h_n, A h_prev) {
  const A one = A(1);
  GruGradients<A> d;
  d.x_n = grad_h * (one - z) * (one - n * n);
  d.h_n = d.x_n * r;
  d.r = d.x_n * h_n * r * (one - r);
  d.z = grad_h * (h_prev - n) * z * (one - z);
  d.h_prev = grad_h * z;
  return d;
}

}  // namespace fusednn::math
