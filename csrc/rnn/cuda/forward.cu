// Forward gates of the LSTM and the GRU cell: everything of a step but its two matrix products.
//
//   LSTM  [i | f | g | o] = gates + bias_ih + bias_hh
//         c' = sigmoid(f) c + sigmoid(i) tanh(g)      h' = sigmoid(o) tanh(c')
//   GRU   r, z = sigmoid(x + b_ih + h + b_hh)         n = tanh(x_n + b_in + r (h_n + b_hn))
//         h' = n + z (h - n)
//
// Tiling: one thread per pack of neighbouring hidden units (tiling.h); nothing is shared between threads,
// so the biases come from the caches. Bytes moved per hidden unit, s = item size: LSTM 7 s, and 4 s more to
// save the activated gates; GRU 8 s, and 4 s more. The kernels are bound by memory once the state outgrows a
// few blocks per multiprocessor, by latency below. Limits: contiguous tensors; widths are 16, 8, 4, ... bytes
// by alignment, down to one element.
#include "core/cuda/launch.h"
#include "core/cuda/vector_access.h"
#include "rnn/cuda/params.h"
#include "rnn/cuda/tiling.h"
#include "rnn/gates.h"

namespace fusednn::cuda {
namespace {

template <class T, int N>
__global__ void __launch_bounds__(kGateThreads) lstm_forward_kernel(LstmGatesForward p, GateTiling tiling) {
  const int64_t H = p.hidden;
  for (int64_t pack = first_pack(); pack < tiling.packs; pack += pack_stride()) {
    const auto [row, column] = tiling.template locate<N>(pack);
    const int64_t state = row * H + column;
    const int64_t gate_row = 4 * row * H + column;

    GatePacks<T, N, 4> products, bias_ih, bias_hh;
    products.load_row(p.gates, gate_row, H);
    bias_ih.load_bias(p.bias_ih, column, H);
    bias_hh.load_bias(p.bias_hh, column, H);
    const Pack<T, N> cx = load<T, N>(p.cx, state);

    Arithmetic<T> sum[4][N];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        sum[k][j] = products.at[k].get(j) + bias_ih.at[k].get(j) + bias_hh.at[k].get(j);
      }
    }

    GatePacks<T, N, 4> gates;
    Pack<T, N> h, c;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto step = math::lstm_forward(sum[0][j], sum[1][j], sum[2][j], sum[3][j], cx.get(j));
      h.set(j, step.h);
      c.set(j, step.c);
      gates.at[0].set(j, step.i);
      gates.at[1].set(j, step.f);
      gates.at[2].set(j, step.g);
      gates.at[3].set(j, step.o);
    }

    store(p.h, state, h);
    store(p.c, state, c);
    if (p.save_gates) gates.store_row(p.gates, gate_row, H);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kGateThreads) gru_forward_kernel(GruGatesForward p, GateTiling tiling) {
  const int64_t H = p.hidden;
  for (int64_t pack = first_pack(); pack < tiling.packs; pack += pack_stride()) {
    const auto [row, column] = tiling.template locate<N>(pack);
    const int64_t state = row * H + column;
    const int64_t product_row = 3 * row * H + column;

    GatePacks<T, N, 3> x, h, bias_ih, bias_hh;
    x.load_row(p.gates_x, product_row, H);
    h.load_row(p.gates_h, product_row, H);
    bias_ih.load_bias(p.bias_ih, column, H);
    bias_hh.load_bias(p.bias_hh, column, H);
    const Pack<T, N> hx = load<T, N>(p.hx, state);

    Arithmetic<T> input[3][N], recurrent[3][N];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        input[k][j] = x.at[k].get(j) + bias_ih.at[k].get(j);
        recurrent[k][j] = h.at[k].get(j) + bias_hh.at[k].get(j);
      }
    }

    GatePacks<T, N, 4> saved;
    Pack<T, N> next;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto step = math::gru_forward(input[0][j] + recurrent[0][j], input[1][j] + recurrent[1][j],
                                          input[2][j], recurrent[2][j], hx.get(j));
      next.set(j, step.h);
      saved.at[0].set(j, step.r);
      saved.at[1].set(j, step.z);
      saved.at[2].set(j, step.n);
      saved.at[3].set(j, recurrent[2][j]);
    }

    store(p.h, state, next);
    if (p.gates != nullptr) saved.store_row(p.gates, 4 * row * H + column, H);
  }
}

}  // namespace

cudaError_t lstm_gates_forward(const LstmGatesForward& p, cudaStream_t stream) {
  const auto kernel = []<class T, int N>() { return lstm_forward_kernel<T, N>; };
  return launch_gates(p, stream, kernel, p.gates, p.bias_ih, p.bias_hh, p.cx, p.h, p.c);
}

cudaError_t gru_gates_forward(const GruGatesForward& p, cudaStream_t stream) {
  const auto kernel = []<class T, int N>() { return gru_forward_kernel<T, N>; };
  return launch_gates(p, stream, kernel, p.gates_x, p.gates_h, p.bias_ih, p.bias_hh, p.hx, p.h, p.gates);
}

}  // namespace fusednn::cuda
