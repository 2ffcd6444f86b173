// The steps of the backward, in reverse, from the saved maps, states and gates.
//
//   d x, d r                     rnn/gates.h; d c goes on to the step before
//   d map[p] = G_t[p] d x        hoisted: G made again, chunk by chunk
//            = sum over c of f_t[c, p] (weight_ih^T d x)[c, p]
//   d z = map (d map - sum of map d map)      z = scores / temperature
//   d h += weight_hh^T d r + hidden_weight^T d term
//
// Direct with frames, all samples share one read of weight_ih a step, by blocks of its columns; else a thread
// takes whole sequences. Gradients of weights and frames are products over all steps, the caller's.
#pragma once

#include "recurrence/cpu/step.h"
#include "rnn/gates.h"

namespace fusednn::cpu::FUSEDNN_ISA {

template <class T>
class BackwardPass : public SequencePass<T> {
  using Base = SequencePass<T>;
  using Base::w, Base::q_, Base::projections_, Base::threads_;

 public:
  BackwardPass(const AttentionLstmBackward& p, const Parallel& parallel, Carver& shared)
      : Base(layout(p.q, parallel.threads, shared)), p_(p), parallel_(parallel) {}

  // A sample keeps [d map | d attended | term].
  static Base layout(const AttentionLstm& q, int threads, Carver& shared) {
    const int64_t elements = padded<T>(q.positions) + padded<T>(q.channels) + padded<T>(q.terms());
    return {q, elements, 0, threads, shared};
  }

  void run() {
    const int64_t steps = Projections<T>::steps_per_chunk(q_);
    for (int64_t last = q_.steps; last > 0; last -= minimum(steps, last)) {
      const int64_t count = minimum(steps, last);
      const Chunk<T> chunk{q_, last - count, count};
      if (q_.hoisted || q_.additive) projections_.make(chunk, threads_, parallel_);
      this->shares_weight() ? together(chunk) : each_alone(chunk);
    }
  }

 private:
  void each_alone(const Chunk<T>& chunk) {
    parallel_(q_.batch, this->worth_it(chunk.count * this->products_per_step()),
              [&](int64_t begin, int64_t end, int) {
                for (int64_t b = begin; b < end; ++b)
                  for (int64_t t = chunk.first + chunk.count - 1; t >= chunk.first; --t) {
                    gates_gradient(b, t);
                    map_gradient(b, t, chunk);
                  }
              });
  }

  void together(const Chunk<T>& chunk) {
    const int64_t last = chunk.first + chunk.count - 1;
    for (int64_t t = last; t >= chunk.first - 1; --t) {
      parallel_(q_.batch, this->worth_it(this->products_per_step()), [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b) {
          if (t < last) map_gradient(b, t + 1, chunk);
          if (t >= chunk.first) gates_gradient(b, t);
        }
      });
      if (t >= chunk.first) attended_gradient(t);
    }
  }

  // d x and d r of sample b at step t; leaves in grad_h what passes by both, in grad_c that of the step before.
  void gates_gradient(int64_t b, int64_t t) {
    const int64_t J = q_.gate_rows(), at = b * q_.steps + t;
    T *d_x = typed<T>(p_.grad_x, at * J), *d_r = typed<T>(p_.grad_r, at * J);
    if (this->ended(b, t)) {
      std::memset(d_x, 0, J * sizeof(T));
      if (d_r) std::memset(d_r, 0, J * sizeof(T));
      return;
    }
    for (int64_t u = 0; u < q_.hidden_size; u += w)
      q_.cell == Cell::lstm ? lstm(b, t, u, d_x) : gru(b, t, u, d_x, d_r);
  }

  const T* previous(const void* first, const void* all, int64_t b, int64_t t) const {
    const int64_t H = q_.hidden_size;
    return t == 0 ? typed<T>(first, b * H) : typed<T>(all, (b * q_.steps + t - 1) * H);
  }

  void lstm(int64_t b, int64_t t, int64_t u, T* d_x) {
    const int64_t H = q_.hidden_size, at = b * q_.steps + t, n = H - u;
    const T* gates = typed<T>(p_.gates, at * 4 * H + u);
    T *d_h = typed<T>(p_.grad_h, b * H + u), *d_c = typed<T>(p_.grad_c, b * H + u);
    const Vec<T> d_now = Vec<T>::load(d_h, n) + load_or_zero<T>(typed<T>(p_.grad_hidden), at * H + u, n);
    const auto gate = [&](int64_t i) { return Vec<T>::load(gates + i * H, n); };
    const auto d = math::lstm_backward(d_now, Vec<T>::load(d_c, n), gate(0), gate(1), gate(2), gate(3),
                                       Vec<T>::load(previous(p_.c0, p_.cells, b, t) + u, n),
                                       Vec<T>::load(typed<T>(p_.cells, at * H + u), n));
    d.i.store(d_x + u, n);
    d.f.store(d_x + H + u, n);
    d.g.store(d_x + 2 * H + u, n);
    d.o.store(d_x + 3 * H + u, n);
    d.c_prev.store(d_c, n);
    Vec<T>(T(0)).store(d_h, n);
  }

  void gru(int64_t b, int64_t t, int64_t u, T* d_x, T* d_r) {
    const int64_t H = q_.hidden_size, at = b * q_.steps + t, n = H - u;
    const T* gates = typed<T>(p_.gates, at * 4 * H + u);
    T* d_h = typed<T>(p_.grad_h, b * H + u);
    const Vec<T> d_now = Vec<T>::load(d_h, n) + load_or_zero<T>(typed<T>(p_.grad_hidden), at * H + u, n);
    const auto gate = [&](int64_t i) { return Vec<T>::load(gates + i * H, n); };
    const auto d = math::gru_backward(d_now, gate(0), gate(1), gate(2), gate(3),
                                      Vec<T>::load(previous(p_.h0, p_.hidden, b, t) + u, n));
    d.r.store(d_x + u, n);
    d.r.store(d_r + u, n);
    d.z.store(d_x + H + u, n);
    d.z.store(d_r + H + u, n);
    d.x_n.store(d_x + 2 * H + u, n);
    d.h_n.store(d_r + 2 * H + u, n);
    d.h_prev.store(d_h, n);
  }

  // grad_attended[b, t] = weight_ih^T d x[b, t] for all samples.
  void attended_gradient(int64_t t) {
    const int64_t J = q_.gate_rows(), N = q_.inputs();
    const Strided<T> d{typed<T>(p_.grad_x, t * J), q_.steps * J, 1};
    T* out = typed<T>(p_.grad_attended, t * N);
    parallel_(ceil_div(N, 4 * w), this->worth_it(q_.batch * J * N), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t column = i * 4 * w;
        const T* weight = typed<T>(q_.weight_ih, column);
        if (N - column >= 4 * w) {
          tiles<4>(q_.batch, J, d, weight, N, out + column, q_.steps * N, 3, Into::overwrite);
          continue;
        }
        for (int64_t b = 0; b < q_.batch; ++b)
          sum_of_rows(J, N - column, d.at(b, 0).data, weight, N, out + b * q_.steps * N + column, false);
      }
    });
  }

  // From d x through the map to the scores, and on to the state before.
  void map_gradient(int64_t b, int64_t t, const Chunk<T>& chunk) {
    const int64_t P = q_.positions, H = q_.hidden_size, J = q_.gate_rows(), at = b * q_.steps + t;
    T* d_scaled = typed<T>(p_.grad_scaled, at * P);
    T* d_products = typed<T>(p_.grad_products, at * q_.energies * P);
    T* d_term = q_.additive ? typed<T>(p_.grad_terms, at * q_.energies) : d_products;
    if (this->ended(b, t)) {
      std::memset(d_scaled, 0, P * sizeof(T));
      std::memset(d_products, 0, q_.energies * P * sizeof(T));
      std::memset(d_term, 0, q_.terms() * sizeof(T));
      return;
    }
    const int64_t frame = b * chunk.count + t - chunk.first;
    T* space = this->sample(b);
    map_from_input(at, chunk.frame(frame), frame, space);
    softmax_gradient(typed<T>(p_.maps, at * P), typed<T>(p_.grad_maps, at * P), space, d_scaled);
    const Vec<T> temperature(static_cast<T>(q_.temperature));
    T* d_scores = q_.additive ? space : d_products;
    for (int64_t p = 0; p < P; p += w)
      (Vec<T>::load(d_scaled + p, P - p) / temperature).store(d_scores + p, P - p);
    if (q_.additive) energies_gradient(b, t, frame, d_scores, d_products, d_term);
    T* d_h = typed<T>(p_.grad_h, b * H);
    const T* d_r = q_.cell == Cell::gru ? typed<T>(p_.grad_r, at * J) : typed<T>(p_.grad_x, at * J);
    sum_of_rows(J, H, d_r, typed<T>(q_.weight_hh), H, d_h, true);
    sum_of_rows(q_.terms(), H, static_cast<const T*>(d_term), typed<T>(q_.hidden_weight), H, d_h, true);
  }

  // d_map[P] from d x.
  void map_from_input(int64_t at, const T* f, int64_t frame, T* d_map) {
    const int64_t P = q_.positions, C = q_.channels, J = q_.gate_rows(), stride = padded<T>(P);
    const T* d_x = typed<T>(p_.grad_x, at * J);
    if (q_.hoisted) {
      sum_of_rows(J, stride, d_x, static_cast<const T*>(projections_.gates + frame * J * stride), stride,
                  d_map, false);
    } else if (!q_.flatten) {
      T* d_attended = d_map + stride;
      sum_of_rows(J, C, d_x, typed<T>(q_.weight_ih), C, d_attended, false);
      sum_of_rows(C, P, static_cast<const T*>(d_attended), f, P, d_map, false);
    } else {
      const T* d_attended = typed<T>(p_.grad_attended, at * C * P);
      for (int64_t p = 0; p < P; p += w) {
        Vec<T> acc(T(0));
        for (int64_t c = 0; c < C; ++c)
          acc = acc + Vec<T>::load(d_attended + c * P + p, P - p) * Vec<T>::load(f + c * P + p, P - p);
        acc.store(d_map + p);
      }
    }
  }

  void softmax_gradient(const T* map, const T* grad_map, const T* d_map, T* d_scaled) const {
    const int64_t P = q_.positions;
    const auto d_at = [&](int64_t p) __attribute__((always_inline)) {
      return Vec<T>::load(d_map + p, P - p) + load_or_zero<T>(grad_map, p, P - p);
    };
    Vec<T> products(T(0));
    for (int64_t p = 0; p < P; p += w) products = products + d_at(p) * Vec<T>::load(map + p, P - p);
    const Vec<T> mean(sum(products));
    for (int64_t p = 0; p < P; p += w)
      (Vec<T>::load(map + p, P - p) * (d_at(p) - mean)).store(d_scaled + p, P - p);
  }

  // Additive scores v tanh(e): the gradients of e [A, P], of its sums over positions [A] and of v.
  void energies_gradient(int64_t b, int64_t t, int64_t frame, const T* d_scores, T* d_products, T* d_term) {
    const int64_t P = q_.positions, A = q_.energies, H = q_.hidden_size, stride = padded<T>(P);
    T* term = this->sample(b) + stride + padded<T>(q_.channels);
    rows_times(A, H, typed<T>(q_.hidden_weight), H, previous(p_.h0, p_.hidden, b, t),
               typed<T>(q_.hidden_bias), term);
    const T* products = projections_.products + frame * A * stride;
    for (int64_t a = 0; a < A; ++a) {
      const Vec<T> v(typed<T>(q_.v)[a]), bias(term[a]);
      Vec<T> of_term(T(0)), of_v(T(0));
      for (int64_t p = 0; p < P; p += w) {
        const Vec<T> e = tanh(Vec<T>::load(products + a * stride + p) + bias);
        const Vec<T> d = Vec<T>::load(d_scores + p, P - p);
        const Vec<T> d_e = v * d * (Vec<T>(T(1)) - e * e);
        d_e.store(d_products + a * P + p, P - p);
        of_term = of_term + d_e;
        of_v = of_v + d * e;
      }
      d_term[a] = sum(of_term);
      typed<T>(p_.grad_v)[b * A + a] += sum(of_v);
    }
  }

  const AttentionLstmBackward& p_;
  const Parallel& parallel_;
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
