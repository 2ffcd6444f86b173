// Forward gates of the LSTM and the GRU cell: everything of a step but its two matrix products.
//
//   LSTM  [i|f|g|o] = gates + bias_ih + bias_hh;  c' = sigmoid(f) c + sigmoid(i) tanh(g);  h' = sigmoid(o)
//   tanh(c') GRU   r, z = sigmoid(x + b_ih + h + b_hh);    n = tanh(x_n + b_in + r (h_n + b_hn));   h' = n +
//   z (h - n)
//
// Tiling: one thread per pack of neighbouring hidden units (rnn_tiling.h); nothing is shared between threads,
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

// Loads of all gates are issued before any is used, the biases' (zero if null) among them: one latency, not
// one for each gate.
template <class T, int N, int K>
struct GatePacks {
  Pack<T, N> at[K];

  __device__ void load_row(const void* data, int64_t offset, int64_t stride) {
#pragma unroll
    for (int k = 0; k < K; ++k) at[k] = load<T, N>(data, offset + k * stride);
  }

  __device__ void load_bias(const void* data, int64_t offset, int64_t stride) {
#pragma unroll
    for (int k = 0; k < K; ++k) at[k] = Pack<T, N>{};
    if (data != nullptr) load_row(data, offset, stride);
  }
};

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

    Pack<T, N> gates[4], h, c;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto step = math::lstm_forward(sum[0][j], sum[1][j], sum[2][j], sum[3][j], cx.get(j));
      h.set(j, step.h);
      c.set(j, step.c);
      gates[0].set(j, step.i);
      gates[1].set(j, step.f);
      gates[2].set(j, step.g);
      gates[3].set(j, step.o);
    }

    store(p.h, state, h);
    store(p.c, state, c);
    if (p.save_gates) {
#pragma unroll
      for (int k = 0; k < 4; ++k) store(p.gates, gate_row + k * H, gates[k]);
    }
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

    Pack<T, N> next, saved[4];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const auto step = math::gru_forward(input[0][j] + recurrent[0][j], input[1][j] + recurrent[1][j],
                                          input[2][j], recurrent[2][j], hx.get(j));
      next.set(j, step.h);
      saved[0].set(j, step.r);
      saved[1].set(j, step.z);
      saved[2].set(j, step.n);
      saved[3].set(j, recurrent[2][j]);
    }

    store(p.h, state, next);
    if (p.gates != nullptr) {
      const int64_t saved_row = 4 * row * H + column;
#pragma unroll
      for (int k = 0; k < 4; ++k) store(p.gates, saved_row + k * H, saved[k]);
    }
  }
}

}  // namespace

cudaError_t lstm_gates_forward(const LstmGatesForward& p, cudaStream_t stream) {
  if (p.batch == 0 || p.hidden == 0) return cudaSuccess;
  const auto run = [&]<class T, int N>(TypeTag<T>, PackWidth<N>) {
    const GateTiling tiling = gate_tiling<N>(p.batch, p.hidden);
    return launch(lstm_forward_kernel<T, N>, gate_blocks(tiling), dim3(kGateThreads), 0, stream, p, tiling);
  };
  return visit_packs(p.dtype, p.batch, p.hidden, run, p.gates, p.bias_ih, p.bias_hh, p.cx, p.h, p.c);
}

cudaError_t gru_gates_forward(const GruGatesForward& p, cudaStream_t stream) {
  if (p.batch == 0 || p.hidden == 0) return cudaSuccess;
  const auto run = [&]<class T, int N>(TypeTag<T>, PackWidth<N>) {
    const GateTiling tiling = gate_tiling<N>(p.batch, p.hidden);
    return launch(gru_forward_kernel<T, N>, gate_blocks(tiling), dim3(kGateThreads), 0, stream, p, tiling);
  };
  return visit_packs(p.dtype, p.batch, p.hidden, run, p.gates_x, p.gates_h, p.bias_ih, p.bias_hh, p.hx, p.h,
                     p.gates);
}

}  // namespace fusednn::cuda
