// The forward of attention inside an LSTM or a GRU.
//
//   a_t = softmax((score_weight f_t, hidden_weight h_{t-1}) / temperature)
//   gates = weight_ih (f_t a_t) + weight_hh h_{t-1} + biases, then rnn/gates.h
//
// Hoisted:       weight_ih (f_t a_t) = sum over p of a_t[p] G_t[p]; a thread takes whole sequences, chunk by
//                chunk of steps (project.h). Bytes: G once, weight_hh and hidden_weight from the second-level
//                cache.
// Direct, sum:   the same, from the frame and weight_ih.
// Direct, frame: weight_ih once a step for all samples, by blocks of its rows; two parallel regions a step.
#pragma once

#include "recurrence/cpu/step.h"
#include "rnn/gates.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int kTogether = 2;  // sequences of a thread
constexpr int kDotRows = 4, kDotSamples = FUSEDNN_VECTOR_BYTES == 64 ? 4 : 2;
constexpr int64_t kDotBytes = 4096;  // of a row of weight_ih at a time

// What a sample keeps from one part of a step to the next.
template <class T>
struct StepSpace {
  T *term, *map, *x, *r, *attended;

  static int64_t elements(const AttentionLstm& q) {
    return padded<T>(q.terms()) + padded<T>(q.positions) + 2 * padded<T>(q.gate_rows()) +
           padded<T>(q.inputs());
  }
  StepSpace(const AttentionLstm& q, T* memory) : term(memory) {
    map = term + padded<T>(q.terms());
    x = map + padded<T>(q.positions);
    r = x + padded<T>(q.gate_rows());
    attended = r + padded<T>(q.gate_rows());
  }
};

template <class T>
class ForwardPass : public SequencePass<T> {
  using Base = SequencePass<T>;
  using Base::w, Base::q_, Base::projections_, Base::threads_;

 public:
  ForwardPass(const AttentionLstmForward& p, const Parallel& parallel, Carver& shared)
      : Base(layout(p.q, parallel.threads, shared)), p_(p), parallel_(parallel) {}

  static Base layout(const AttentionLstm& q, int threads, Carver& shared) {
    return {q, StepSpace<T>::elements(q), dot_elements(q), threads, shared};
  }

  void run() {
    const int64_t steps = Projections<T>::steps_per_chunk(q_);
    for (int64_t t = 0; t < q_.steps; t += steps) {
      const Chunk<T> chunk{q_, t, minimum(steps, q_.steps - t)};
      projections_.make(chunk, threads_, parallel_);
      this->shares_weight() ? together(chunk) : each_alone(chunk);
    }
  }

 private:
  // Of a thread's partial sums in multiply_inputs.
  static int64_t dot_elements(const AttentionLstm& q) {
    return ceil_div(q.batch, kDotSamples) * kDotSamples * kDotRows * w;
  }
  StepSpace<T> space(int64_t b) const { return {q_, this->sample(b)}; }

  void each_alone(const Chunk<T>& chunk) {
    parallel_(q_.batch, this->worth_it(chunk.count * this->products_per_step()),
              [&](int64_t begin, int64_t end, int) {
                int64_t b = begin;
                for (; b + kTogether <= end; b += kTogether) some_alone<kTogether>(b, chunk);
                for (; b < end; ++b) some_alone<1>(b, chunk);
              });
  }

  // All steps of M sequences, which share reads of the state's weights.
  template <int M>
  void some_alone(int64_t b, const Chunk<T>& chunk) {
    for (int64_t t = chunk.first; t < chunk.first + chunk.count; ++t) {
      multiply_states<M>(b);
      for (int m = 0; m < M; ++m) {
        attend(b + m, t, chunk);
        update(b + m, t);
      }
    }
  }

  void together(const Chunk<T>& chunk) {
    const int64_t last = chunk.first + chunk.count;
    for (int64_t t = chunk.first; t <= last; ++t) {
      parallel_(q_.batch, this->worth_it(this->products_per_step()), [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b) {
          if (t > chunk.first) update(b, t - 1);
          if (t < last) {
            multiply_states<1>(b);
            attend(b, t, chunk);
          }
        }
      });
      if (t < last) multiply_inputs();
    }
  }

  // The products of the states of samples [b, b + M): the scores' term and that of the gates.
  template <int M>
  void multiply_states(int64_t b) {
    const int64_t H = q_.hidden_size, next = this->sample_elements_;
    const StepSpace<T> s = space(b);
    const T* h = typed<T>(p_.h, b * H);
    rows_times<M, T>(q_.terms(), H, typed<T>(q_.hidden_weight), H, h, H, typed<T>(q_.hidden_bias), s.term,
                     next);
    rows_times<M, T>(q_.gate_rows(), H, typed<T>(q_.weight_hh), H, h, H, typed<T>(p_.bias_hh), s.r, next);
  }

  // The map of sample b at step t, and its input's product, or, where samples share reads of weight_ih, input.
  void attend(int64_t b, int64_t t, const Chunk<T>& chunk) {
    T* map = typed<T>(p_.maps, (b * q_.steps + t) * q_.positions);
    if (this->ended(b, t)) {
      std::memset(map, 0, q_.positions * sizeof(T));
      return;
    }
    const StepSpace<T> s = space(b);
    const int64_t J = q_.gate_rows(), P = q_.positions, stride = padded<T>(P);
    const int64_t frame = b * chunk.count + t - chunk.first;
    scores(q_, projections_.products + frame * q_.energies * stride, s.term, s.map);
    softmax_row<T>(P, nullptr, static_cast<T>(q_.temperature), s.map);
    copy(P, s.map, map);
    const T* bias = typed<T>(p_.bias_ih);
    if (q_.hoisted) {
      rows_times(J, stride, projections_.gates + frame * J * stride, stride, s.map, bias, s.x);
    } else if (!q_.flatten) {
      rows_times(q_.channels, P, chunk.frame(frame), P, s.map, static_cast<const T*>(nullptr), s.attended);
      rows_times(J, q_.channels, typed<T>(q_.weight_ih), q_.channels, s.attended, bias, s.x);
    } else {
      weigh(chunk.frame(frame), s.map, s.attended);
    }
  }

  // attended[c, p] = f[c, p] map[p]
  void weigh(const T* f, const T* map, T* attended) const {
    const int64_t P = q_.positions;
    for (int64_t c = 0; c < q_.channels; ++c, f += P, attended += P)
      for (int64_t p = 0; p < P; p += w)
        (Vec<T>::load(f + p, P - p) * Vec<T>::load(map + p)).store(attended + p, P - p);
  }

  // x[b, j] = bias[j] + weight_ih[j] attended[b] for all samples.
  void multiply_inputs() {
    const int64_t J = q_.gate_rows();
    const bool worth_it = this->worth_it(q_.batch * J * q_.inputs());
    parallel_(ceil_div(J, kDotRows), worth_it, [&](int64_t begin, int64_t end, int thread) {
      T* partial = threads_.of(thread).template take<T>(dot_elements(q_));
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = i * kDotRows; j < minimum(J, (i + 1) * kDotRows);)
          j += j + kDotRows <= J ? input_rows<kDotRows>(j, partial) : input_rows<1>(j, partial);
    });
  }

  template <int R>
  int64_t input_rows(int64_t j, T* partial) {
    constexpr int64_t chunk = kDotBytes / sizeof(T);
    const int64_t K = q_.inputs(), stride = this->sample_elements_,
                  whole = q_.batch / kDotSamples * kDotSamples;
    const T* weight = typed<T>(q_.weight_ih, j * K);
    const T* attended = space(0).attended;
    std::memset(partial, 0, dot_elements(q_) * sizeof(T));
    for (int64_t k = 0; k < K; k += chunk) {
      const int64_t n = minimum(chunk, K - k);
      for (int64_t b = 0; b < whole; b += kDotSamples)
        dots<kDotSamples, R>(n, attended + b * stride + k, stride, weight + k, K, partial + b * R * w);
      for (int64_t b = whole; b < q_.batch; ++b)
        dots<1, R>(n, attended + b * stride + k, stride, weight + k, K, partial + b * R * w);
    }
    const T* bias = typed<T>(p_.bias_ih);
    for (int64_t b = 0; b < q_.batch; ++b)
      for (int r = 0; r < R; ++r)
        space(b).x[j + r] = sum(Vec<T>::load(partial + (b * R + r) * w)) + (bias ? bias[j + r] : T(0));
    return R;
  }

  // partial[m, r] += a[m] weight[r] lane by lane.
  template <int M, int R>
  static void dots(int64_t K, const T* a, int64_t a_stride, const T* weight, int64_t stride, T* partial) {
    Vec<T> acc[M][R];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[m][r] = Vec<T>::load(partial + (m * R + r) * w);
    dot_accumulate<M, R>(acc, K, a, a_stride, weight, stride);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[m][r].store(partial + (m * R + r) * w);
  }

  // The cell: h and c of sample b from both products.
  void update(int64_t b, int64_t t) {
    const int64_t H = q_.hidden_size, at = (b * q_.steps + t) * H;
    T *h = typed<T>(p_.h, b * H), *c = typed<T>(p_.c, b * H), *hidden = typed<T>(p_.hidden, at);
    T *gates = typed<T>(p_.gates, 4 * at), *cells = typed<T>(p_.cells, at);
    if (this->ended(b, t)) {
      std::memset(hidden, 0, H * sizeof(T));
      if (gates) std::memset(gates, 0, 4 * H * sizeof(T));
    } else {
      const StepSpace<T> s = space(b);
      for (int64_t u = 0; u < H; u += w)
        q_.cell == Cell::lstm ? lstm(s, u, h, c, gates) : gru(s, u, h, gates);
      copy(H, h, hidden);
    }
    if (cells) copy(H, c, cells);
  }

  void save(T* gates, int64_t u, Vec<T> a, Vec<T> b, Vec<T> c, Vec<T> d) const {
    const int64_t H = q_.hidden_size, n = H - u;
    if (!gates) return;
    a.store(gates + u, n);
    b.store(gates + H + u, n);
    c.store(gates + 2 * H + u, n);
    d.store(gates + 3 * H + u, n);
  }

  void lstm(const StepSpace<T>& s, int64_t u, T* h, T* c, T* gates) const {
    const int64_t H = q_.hidden_size, n = H - u;
    const auto gate = [&](int64_t i) {
      return Vec<T>::load(s.x + i * H + u, n) + Vec<T>::load(s.r + i * H + u, n);
    };
    const auto now = math::lstm_forward(gate(0), gate(1), gate(2), gate(3), Vec<T>::load(c + u, n));
    now.h.store(h + u, n);
    now.c.store(c + u, n);
    save(gates, u, now.i, now.f, now.g, now.o);
  }

  void gru(const StepSpace<T>& s, int64_t u, T* h, T* gates) const {
    const int64_t H = q_.hidden_size, n = H - u;
    const auto x = [&](int64_t i) { return Vec<T>::load(s.x + i * H + u, n); };
    const auto r = [&](int64_t i) { return Vec<T>::load(s.r + i * H + u, n); };
    const auto now = math::gru_forward(x(0) + r(0), x(1) + r(1), x(2), r(2), Vec<T>::load(h + u, n));
    now.h.store(h + u, n);
    save(gates, u, now.r, now.z, now.n, r(2));
  }

  const AttentionLstmForward& p_;
  const Parallel& parallel_;
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
