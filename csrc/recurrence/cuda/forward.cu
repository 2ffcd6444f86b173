// Attention inside an LSTM or a GRU, a whole sequence in one launch: one block a sequence.
//
//   s = products_t + W_hidden h + b, or v tanh(.)      a = softmax(s / T)   over positions, in shared memory
//   x = sum_p a[p] G_t[p], or W_ih sum_p a[p] f_t[p]   r = W_hh h + b_hh    h, c = cell(x, r, h, c)
//
// products = score_weight f and G[p] = W_ih[:, p] f[:, p] of all steps are the caller's. A step reads
// [W_hh; W_hidden] from the second-level cache, (J + Q) H numbers for one product, and G_t, J P numbers (or
// the frame, C P, and W_ih, J C), once, from memory: bytes B T (4 J P + 4 K P) in all, and what one
// multiprocessor draws from the cache bounds a step. State, scores and map stay in shared memory.
//
// Where the attended frame is the cell's input and nothing was projected, a step's product with W_ih, which
// all sequences share, is the caller's between two launches; the state then passes through memory.
#include "recurrence/cuda/common.h"
#include "rnn/gates.h"

namespace fusednn::cuda {
namespace {

template <class T>
struct ForwardStep {
  using A = Arithmetic<T>;

  const AttentionLstmForward& p;
  const AttentionLstm& q;
  const int64_t b;
  const A temperature;
  const StepVectors<A> s;

  __device__ ForwardStep(const AttentionLstmForward& p, int64_t sequence)
      : p(p), q(p.q), b(sequence), temperature(temperature_of<A>(p.q)), s(p.q) {}

  __device__ int64_t frame(int t) const { return b * q.steps + t; }

  __device__ void load_state() const {
    s.load_state(p.h, p.c, b, q.hidden_size);
    if (q.input == CellInput::between)
      each(q.gate_rows(), [&](int j) { s.r[j] = wide<A>(p.r, b, q.gate_rows())[j]; });
    __syncthreads();
  }

  __device__ void store_state() const {
    s.store_state(p.h, p.c, b, q.hidden_size);
    if (q.input == CellInput::between)
      each(q.gate_rows(), [&](int j) { wide<A>(p.r, b, q.gate_rows())[j] = s.r[j]; });
  }

  // The step up to its map, and the attended frame if that is the caller's to multiply.
  __device__ void attend(int t) {
    const int J = q.gate_rows(), P = q.positions, N = J + q.terms();
    times_rows(q.hidden_size, N, s.h, static_cast<const T*>(p.weight), N, [&](int n, A sum) {
      s.r[n] = sum + (n < J ? element_or_zero<T>(p.bias_hh, n) : element_or_zero<T>(p.hidden_bias, n - J));
    });
    score(t);
    softmax();
    T* to = static_cast<T*>(p.maps) + frame(t) * P;
    each(P, [&](int i) { to[i] = narrow<T>(s.map[i]); });
    if (q.input != CellInput::between) return;
    const T* f = frame_of<T>(q, b, t);
    A* scaled = wide<A>(p.attended, b, int64_t{q.channels} * P);
    for (int64_t i = threadIdx.x; i < int64_t{q.channels} * P; i += kStepThreads)
      scaled[i] = widen(f[i]) * s.map[i % P];
  }

  __device__ void score(int t) {
    const int P = q.positions;
    const A* products = static_cast<const A*>(q.products) + frame(t) * q.energies * P;
    const A* term = s.r + q.gate_rows();
    if (!q.additive) {
      each(P, [&](int i) { s.map[i] = products[i] + term[i]; });
      __syncthreads();
      return;
    }
    column_sums<1, A>(
        q.energies, P,
        [&](int k, int i, A(&sums)[1]) {
          const A e = math::tanh(products[static_cast<int64_t>(k) * P + i] + term[k]);
          sums[0] += widen(static_cast<const T*>(q.v)[k]) * e;
        },
        [&](int i, A sum) { s.map[i] = sum; });
  }

  // Scores become the map. Each thread touches its own positions alone.
  __device__ void softmax() {
    A largest = -kInfinity<A>, sum = 0;
    each(q.positions, [&](int i) { largest = s.map[i] > largest ? s.map[i] : largest; });
    largest = block_max<kStepWarps>(largest);
    const A origin = largest == -kInfinity<A> ? A(0) : largest;
    each(q.positions, [&](int i) {
      s.map[i] = softmax_weight(s.map[i] - origin, temperature);
      sum += s.map[i];
    });
    sum = block_sum<kStepWarps>(sum);
    each(q.positions, [&](int i) { s.map[i] /= sum == A(0) ? A(1) : sum; });
    __syncthreads();
  }

  // The rest of the step.
  __device__ void recur(int t) {
    const int J = q.gate_rows(), P = q.positions, C = q.channels;
    const auto write = [&](int j, A sum) { s.x[j] = sum + element_or_zero<T>(p.bias_ih, j); };
    if (q.input == CellInput::projected) {
      times_rows(P, J, s.map, static_cast<const A*>(q.projected) + frame(t) * q.frame_stride,
                 q.position_stride, write);
    } else if (q.input == CellInput::sum) {
      const T* f = frame_of<T>(q, b, t);
      const auto take = [&](int i, A sum) { s.attended[i] = sum; };
      if (q.channels_last) {
        times_rows(P, C, s.map, f, C, take);
      } else {
        rows_times(C, P, f, P, s.map, take);
        __syncthreads();
      }
      times_rows(C, J, s.attended, static_cast<const T*>(p.weight_ih), J, write);
    } else {
      each(J, [&](int j) { write(j, static_cast<const A*>(p.x)[b * J + j]); });
      __syncthreads();
    }
    each(q.hidden_size, [&](int u) { q.lstm ? lstm(t, u) : gru(t, u); });
    __syncthreads();
  }

  __device__ void lstm(int t, int u) {
    const int H = q.hidden_size;
    const auto gate = [&](int i) { return s.x[i * H + u] + s.r[i * H + u]; };
    const math::LstmStep<A> now = math::lstm_forward(gate(0), gate(1), gate(2), gate(3), s.c[u]);
    s.c[u] = now.c;
    if (p.cells) wide<A>(p.cells, frame(t), H)[u] = now.c;
    keep(t, u, now.i, now.f, now.g, now.o, now.h);
  }

  __device__ void gru(int t, int u) {
    const int H = q.hidden_size;
    const A h_n = s.r[2 * H + u];
    const math::GruStep<A> now =
        math::gru_forward(s.x[u] + s.r[u], s.x[H + u] + s.r[H + u], s.x[2 * H + u], h_n, s.h[u]);
    keep(t, u, now.r, now.z, now.n, h_n, now.h);
  }

  __device__ void keep(int t, int u, A g0, A g1, A g2, A g3, A state) {
    const int H = q.hidden_size;
    s.h[u] = state;
    static_cast<T*>(p.hidden)[frame(t) * H + u] = narrow<T>(state);
    if (!p.gates) return;
    A* gates = wide<A>(p.gates, frame(t), 4 * int64_t{H}) + u;
    gates[0] = g0, gates[H] = g1, gates[2 * H] = g2, gates[3 * H] = g3;
  }
};

template <class T>
__global__ void __launch_bounds__(kStepThreads, 1) attention_lstm_forward_kernel(AttentionLstmForward p) {
  const bool between = p.q.input == CellInput::between;
  ForwardStep<T> step(p, blockIdx.x);
  const int length = length_of(p.q, blockIdx.x);
  step.load_state();
  for (int t = p.q.first; t < min(p.q.last, length + (between ? 1 : 0)); ++t) {
    if (between && t > 0) step.recur(t - 1);
    if (t < length) step.attend(t);
    if (!between) step.recur(t);
  }
  __syncthreads();
  step.store_state();
}

}  // namespace

size_t attention_lstm_shared_bytes(const AttentionLstm& q) {
  const bool f64 = q.dtype == DType::f64;
  const int64_t sums = f64 ? kStepSums<double> : kStepSums<float>, rows = q.gate_rows();
  const int64_t numbers = sums + 2 * int64_t{q.hidden_size} + 2 * rows + q.terms() + q.positions + q.channels;
  return numbers * (f64 ? sizeof(double) : sizeof(float));
}

cudaError_t attention_lstm_forward(const AttentionLstmForward& p, cudaStream_t stream) {
  return visit_dtype(p.q.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(attention_lstm_forward_kernel<T>, dim3(static_cast<unsigned>(p.q.batch)),
                  dim3(kStepThreads), attention_lstm_shared_bytes(p.q), stream, p);
  });
}

}  // namespace fusednn::cuda
