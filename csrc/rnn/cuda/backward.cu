// Backward gates of the LSTM and the GRU cell, from the saved activated gates.
//
//   LSTM  dc = grad_c + grad_h o (1 - tanh(c)^2)      d[i|f|g|o] = the products of dc (grad_h for o) with the
//   other
//         grad_cx = dc f                              factors and the derivative of each activation
//   GRU   dx_n = grad_h (1 - z)(1 - n^2)              dh_n = dx_n r       dr = dx_n h_n r (1 - r)
//         dz = grad_h (h - n) z (1 - z)               grad_hx = grad_h z, to which the caller adds the
//         product
//
// Tiling: as forward, one thread per pack of neighbouring hidden units (rnn_tiling.h).
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

    Pack<T, N> gates[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) gates[k] = load<T, N>(p.gates, gate_row + k * H);
    const Pack<T, N> cx = load<T, N>(p.cx, state);
    const Pack<T, N> c = load<T, N>(p.c, state);
    const Pack<T, N> grad_h = load_or_zero<T, N>(p.grad_h, state);
    const Pack<T, N> grad_c = load_or_zero<T, N>(p.grad_c, state);

    Pack<T, N> grad_cx;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto d = math::lstm_backward(grad_h.get(j), grad_c.get(j), gates[0].get(j), gates[1].get(j),
                                         gates[2].get(j), gates[3].get(j), cx.get(j), c.get(j));
      gates[0].set(j, d.i);
      gates[1].set(j, d.f);
      gates[2].set(j, d.g);
      gates[3].set(j, d.o);
      grad_cx.set(j, d.c_prev);
    }

#pragma unroll
    for (int k = 0; k < 4; ++k) store(p.grad_gates, gate_row + k * H, gates[k]);
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

    Pack<T, N> gates[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) gates[k] = load<T, N>(p.gates, gate_row + k * H);
    const Pack<T, N> hx = load<T, N>(p.hx, state);
    const Pack<T, N> grad_h = load<T, N>(p.grad_h, state);

    Pack<T, N> d_r, d_z, d_x_n, d_h_n, grad_hx;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto d = math::gru_backward(grad_h.get(j), gates[0].get(j), gates[1].get(j), gates[2].get(j),
                                        gates[3].get(j), hx.get(j));
      d_r.set(j, d.r);
      d_z.set(j, d.z);
      d_x_n.set(j, d.x_n);
      d_h_n.set(j, d.h_n);
      grad_hx.set(j, d.h_prev);
    }

    store(p.grad_gates_x, product_row, d_r);
    store(p.grad_gates_x, product_row + H, d_z);
    store(p.grad_gates_x, product_row + 2 * H, d_x_n);
    store(p.grad_gates_h, product_row, d_r);
    store(p.grad_gates_h, product_row + H, d_z);
    store(p.grad_gates_h, product_row + 2 * H, d_h_n);
    store(p.grad_hx, state, grad_hx);
  }
}

}  // namespace

cudaError_t lstm_gates_backward(const LstmGatesBackward& p, cudaStream_t stream) {
  if (p.batch == 0 || p.hidden == 0) return cudaSuccess;
  const auto run = [&]<class T, int N>(TypeTag<T>, PackWidth<N>) {
    const GateTiling tiling = gate_tiling<N>(p.batch, p.hidden);
    return launch(lstm_backward_kernel<T, N>, gate_blocks(tiling), dim3(kGateThreads), 0, stream, p, tiling);
  };
  return visit_packs(p.dtype, p.batch, p.hidden, run, p.grad_h, p.grad_c, p.gates, p.cx, p.c, p.grad_gates,
                     p.grad_cx);
}

cudaError_t gru_gates_backward(const GruGatesBackward& p, cudaStream_t stream) {
  if (p.batch == 0 || p.hidden == 0) return cudaSuccess;
  const auto run = [&]<class T, int N>(TypeTag<T>, PackWidth<N>) {
    const GateTiling tiling = gate_tiling<N>(p.batch, p.hidden);
    return launch(gru_backward_kernel<T, N>, gate_blocks(tiling), dim3(kGateThreads), 0, stream, p, tiling);
  };
  return visit_packs(p.dtype, p.batch, p.hidden, run, p.grad_h, p.gates, p.hx, p.grad_gates_x, p.grad_gates_h,
                     p.grad_hx);
}

}  // namespace fusednn::cuda
