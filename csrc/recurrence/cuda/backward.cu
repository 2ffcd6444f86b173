// The steps of the backward in reverse, from the saved maps, states and gates: one block a sequence.
//
//   d x, d r    rnn/gates.h; d c goes on to the step before
//   d a[p]      = G_t[p] d x, or f_t[:, p] (W_ih^T d x)
//   d z         = a (d a - sum_p a d a)      z = s / T      d term = d z / T, or sum_p of d e, e = tanh(.)
//   d h        += [W_hh; W_hidden]^T [d r; d term]
//
// Gradients of weights and frames are products over all steps of what this writes: the caller's. A step reads
// what the forward's reads, and 9 H numbers saved. Sums are taken in one order.
#include "recurrence/cuda/common.h"
#include "rnn/gates.h"

namespace fusednn::cuda {
namespace {

template <class T>
struct BackwardStep {
  using A = Arithmetic<T>;

  const AttentionLstmBackward& p;
  const AttentionLstm& q;
  const int64_t b;
  const A temperature;
  const StepVectors<A> d;

  __device__ BackwardStep(const AttentionLstmBackward& p, int64_t sequence)
      : p(p), q(p.q), b(sequence), temperature(temperature_of<A>(p.q)), d(p.q) {}

  __device__ int64_t frame(int t) const { return b * q.steps + t; }
  // The state before step t.
  template <class X>
  __device__ A previous(const void* first, const void* all, int t, int u) const {
    const int64_t H = q.hidden_size;
    return t == 0 ? widen(static_cast<const T*>(first)[b * H + u])
                  : A(widen(static_cast<const X*>(all)[(frame(t) - 1) * H + u]));
  }

  // d x and d r of a step; leaves in d h what passes by both, in d c that of the step before.
  __device__ void gates_gradient(int t) {
    const int H = q.hidden_size;
    each(H, [&](int u) {
      const A d_now = d.h[u] + element_or_zero<T>(p.grad_hidden, frame(t) * H + u);
      const A* saved = static_cast<const A*>(p.gates) + frame(t) * 4 * H + u;
      q.lstm ? lstm(t, u, d_now, saved) : gru(t, u, d_now, saved);
    });
    __syncthreads();
    A *x = wide<A>(p.d_x, frame(t), q.gate_rows()), *r = wide<A>(p.d_r, frame(t), q.gate_rows());
    each(q.gate_rows(), [&](int j) {
      x[j] = d.x[j];
      if (r) r[j] = d.r[j];
    });
  }

  __device__ void lstm(int t, int u, A d_now, const A* saved) {
    const int H = q.hidden_size;
    const math::LstmGradients<A> g = math::lstm_backward(d_now, d.c[u], saved[0], saved[H], saved[2 * H],
                                                         saved[3 * H], previous<A>(p.c0, p.cells, t, u),
                                                         static_cast<const A*>(p.cells)[frame(t) * H + u]);
    d.x[u] = d.r[u] = g.i;
    d.x[H + u] = d.r[H + u] = g.f;
    d.x[2 * H + u] = d.r[2 * H + u] = g.g;
    d.x[3 * H + u] = d.r[3 * H + u] = g.o;
    d.c[u] = g.c_prev;
    d.h[u] = 0;
  }

  __device__ void gru(int t, int u, A d_now, const A* saved) {
    const int H = q.hidden_size;
    const math::GruGradients<A> g = math::gru_backward(d_now, saved[0], saved[H], saved[2 * H], saved[3 * H],
                                                       previous<T>(p.h0, p.hidden, t, u));
    d.x[u] = d.r[u] = g.r;
    d.x[H + u] = d.r[H + u] = g.z;
    d.x[2 * H + u] = g.x_n;
    d.r[2 * H + u] = g.h_n;
    d.h[u] = g.h_prev;
  }

  // From d x through the map to the scores, and on to the state before.
  __device__ void map_gradient(int t) {
    const int J = q.gate_rows(), H = q.hidden_size;
    if (q.input == CellInput::between) {  // another launch made it
      const A* r = static_cast<const A*>(p.d_r ? p.d_r : p.d_x) + frame(t) * J;
      each(J, [&](int j) { d.r[j] = r[j]; });
    }
    map_from_input(t);
    __syncthreads();
    softmax_gradient(t);
    if (q.additive) energies_gradient(t);
    times_rows(J + q.terms(), H, d.r, static_cast<const T*>(p.weight), H,
               [&](int u, A sum) { d.h[u] += sum; });
  }

  __device__ void map_from_input(int t) {
    const int J = q.gate_rows(), P = q.positions, C = q.channels;
    const auto take = [&](int i, A sum) { d.map[i] = sum; };
    const T* f = frame_of<T>(q, b, t);
    if (q.input == CellInput::projected) {
      rows_times(P, J, static_cast<const A*>(q.projected) + frame(t) * q.frame_stride, q.position_stride, d.x,
                 take);
    } else if (q.input == CellInput::sum) {
      times_rows(J, C, d.x, static_cast<const T*>(p.weight_ih), C,
                 [&](int i, A sum) { d.attended[i] = sum; });
      if (q.channels_last)
        rows_times(P, C, f, C, d.attended, take);
      else
        times_rows(C, P, d.attended, f, P, take);
    } else {
      const A* d_attended = static_cast<const A*>(p.d_attended) + b * C * P;
      column_sums<1, A>(
          C, P,
          [&](int k, int i, A(&sums)[1]) {
            const int64_t at = static_cast<int64_t>(k) * P + i;
            sums[0] += d_attended[at] * widen(f[at]);
          },
          take);
    }
  }

  // d a becomes d s = d z / T, which of positional scores is the gradient of the state's term.
  __device__ void softmax_gradient(int t) {
    const int64_t first = frame(t) * q.positions;
    const T* map = static_cast<const T*>(p.maps) + first;
    A dot = 0;
    each(q.positions, [&](int i) {
      d.map[i] += element_or_zero<T>(p.grad_maps, first + i);
      dot += d.map[i] * widen(map[i]);
    });
    dot = block_sum<kStepWarps>(dot);
    each(q.positions, [&](int i) {
      const A d_z = widen(map[i]) * (d.map[i] - dot), d_s = d_z / temperature;
      static_cast<A*>(p.d_scaled)[first + i] = d_z;
      d.map[i] = d_s;
      if (q.additive) return;
      d.r[q.gate_rows() + i] = d_s;
      static_cast<A*>(p.d_products)[first + i] = d_s;
    });
    __syncthreads();
  }

  // Additive scores v e: the gradients of e [A, P] before its tanh, of their sums over positions, and of v. A
  // warp takes a row.
  __device__ void energies_gradient(int t) {
    const int P = q.positions, K = q.energies, lane = threadIdx.x % 32;
    const int64_t first = frame(t) * K;
    for (int k = threadIdx.x / 32; k < K; k += kStepWarps) {
      const A* products = static_cast<const A*>(q.products) + (first + k) * P;
      A* d_products = static_cast<A*>(p.d_products) + (first + k) * P;
      const A term = static_cast<const A*>(p.terms)[first + k], v = widen(static_cast<const T*>(q.v)[k]);
      A of_term = 0, of_v = 0;
      for (int i = lane; i < P; i += 32) {
        const A e = math::tanh(products[i] + term), d_e = v * d.map[i] * (1 - e * e);
        d_products[i] = d_e;
        of_term += d_e;
        of_v += d.map[i] * e;
      }
      of_term = warp_sum(of_term);
      of_v = warp_sum(of_v);
      if (lane != 0) continue;
      d.r[q.gate_rows() + k] = of_term;
      static_cast<A*>(p.d_terms)[first + k] = of_term;
      static_cast<A*>(p.d_v)[first + k] = of_v;
    }
    __syncthreads();
  }
};

template <class T>
__global__ void __launch_bounds__(kStepThreads, 1) attention_lstm_backward_kernel(AttentionLstmBackward p) {
  const bool between = p.q.input == CellInput::between;
  BackwardStep<T> step(p, blockIdx.x);
  const int length = length_of(p.q, blockIdx.x);
  step.d.load_state(p.d_h, p.d_c, blockIdx.x, p.q.hidden_size);
  __syncthreads();
  for (int t = min(p.q.last, length + (between ? 1 : 0)) - 1; t >= p.q.first; --t) {
    if (!between) step.gates_gradient(t);
    if (t < length) step.map_gradient(t);
    if (between && t > 0) step.gates_gradient(t - 1);
  }
  __syncthreads();
  step.d.store_state(p.d_h, p.d_c, blockIdx.x, p.q.hidden_size);
}

}  // namespace

cudaError_t attention_lstm_backward(const AttentionLstmBackward& p, cudaStream_t stream) {
  return visit_dtype(p.q.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(attention_lstm_backward_kernel<T>, dim3(static_cast<unsigned>(p.q.batch)),
                  dim3(kStepThreads), attention_lstm_shared_bytes(p.q), stream, p);
  });
}

}  // namespace fusednn::cuda
