// Backward gates of the LSTM and the GRU cell, from the saved activated gates.
//
//   LSTM  dc = grad_c + grad_h o (1 - tanh(c)^2)      grad_cx = dc f
//         d[i | f | g | o] = dc (grad_h for o) times the other factor and the derivative of the activation
//   GRU   dx_n = grad_h (1 - z) (1 - n^2)             dh_n = dx_n r       dr = dx_n h_n r (1 - r)
//         dz = grad_h (h - n) z (1 - z)               grad_hx = grad_h z, to which the caller adds the product
//
// Tiling: as forward, one thread per pack of neighbouring hidden units (tiling.h).
// Bytes moved per hidden unit, s = item size: LSTM 13 s (one less without grad_h or grad_c); GRU 13 s.
// Limits: contiguous tensors; tanh(c) comes from the stored, hence rounded, c.
#include "core/cuda/launch.h"
#include "core/cuda/vector_access.h"
#include "rnn/cuda/params.h"
#include "rnn/cuda/tiling.h"
#include "rnn/gates.h"

namespace fusednn::cuda {
namespace {

template <class T, int N>
__global__ void __launch_bounds__(kGateThreads) lstm_backward_kernel(LstmGatesBackward p, GateTiling tiling) {
  const int64_t H = p.hidden;
  for (int64_t pack = first_pack(); pack < tiling.packs; pack += pack_stride()) {
    const auto [row, column] = tiling.template locate<N>(pack);
    const int64_t state = row * H + column;
    const int64_t gate_row = 4 * row * H + column;

    GatePacks<T, N, 4> gates;
    gates.load_row(p.gates, gate_row, H);
    const Pack<T, N> cx = load<T, N>(p.cx, state);
    const Pack<T, N> c = load<T, N>(p.c, state);
    const Pack<T, N> grad_h = load_or_zero<T, N>(p.grad_h, state);
    const Pack<T, N> grad_c = load_or_zero<T, N>(p.grad_c, state);

    Pack<T, N> grad_cx;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto d = math::lstm_backward(grad_h.get(j), grad_c.get(j), gates.at[0].get(j), gates.at[1].get(j),
                                         gates.at[2].get(j), gates.at[3].get(j), cx.get(j), c.get(j));
      gates.at[0].set(j, d.i);
      gates.at[1].set(j, d.f);
      gates.at[2].set(j, d.g);
      gates.at[3].set(j, d.o);
      grad_cx.set(j, d.c_prev);
    }

    gates.store_row(p.grad_gates, gate_row, H);
    store(p.grad_cx, state, grad_cx);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kGateThreads) gru_backward_kernel(GruGatesBackward p, GateTiling tiling) {
  const int64_t H = p.hidden;
  for (int64_t pack = first_pack(); pack < tiling.packs; pack += pack_stride()) {
    const auto [row, column] = tiling.template locate<N>(pack);
    const int64_t state = row * H + column;
    const int64_t gate_row = 4 * row * H + column;
    const int64_t product_row = 3 * row * H + column;

    GatePacks<T, N, 4> gates;
    gates.load_row(p.gates, gate_row, H);
    const Pack<T, N> hx = load<T, N>(p.hx, state);
    const Pack<T, N> grad_h = load<T, N>(p.grad_h, state);

    GatePacks<T, N, 3> d_x;
    Pack<T, N> d_h_n, grad_hx;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto d = math::gru_backward(grad_h.get(j), gates.at[0].get(j), gates.at[1].get(j),
                                        gates.at[2].get(j), gates.at[3].get(j), hx.get(j));
      d_x.at[0].set(j, d.r);
      d_x.at[1].set(j, d.z);
      d_x.at[2].set(j, d.x_n);
      d_h_n.set(j, d.h_n);
      grad_hx.set(j, d.h_prev);
    }

    d_x.store_row(p.grad_gates_x, product_row, H);
    store(p.grad_gates_h, product_row, d_x.at[0]);
    store(p.grad_gates_h, product_row + H, d_x.at[1]);
    store(p.grad_gates_h, product_row + 2 * H, d_h_n);
    store(p.grad_hx, state, grad_hx);
  }
}

}  // namespace

cudaError_t lstm_gates_backward(const LstmGatesBackward& p, cudaStream_t stream) {
  const auto kernel = []<class T, int N>() { return lstm_backward_kernel<T, N>; };
  return launch_gates(p, stream, kernel, p.grad_h, p.grad_c, p.gates, p.cx, p.c, p.grad_gates, p.grad_cx);
}

cudaError_t gru_gates_backward(const GruGatesBackward& p, cudaStream_t stream) {
  const auto kernel = []<class T, int N>() { return gru_backward_kernel<T, N>; };
  return launch_gates(p, stream, kernel, p.grad_h, p.gates, p.hx, p.grad_gates_x, p.grad_gates_h, p.grad_hx);
}

}  // namespace fusednn::cuda
