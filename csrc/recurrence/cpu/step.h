// What both passes share: their workspace, and the pieces of a step: products of a weight and a vector, scores.
#pragma once

#include "recurrence/cpu/project.h"
#include "spatial/cpu/rows.h"

namespace fusednn::cpu::FUSEDNN_ISA {

// out[m, R] = weight[R, K] x[m, K] + bias for M vectors x. Row after row, as they lie in memory: rows side by
// side would be so many streams, which no prefetcher follows, and sums of different rows overlap even so.
template <int M, class T>
void rows_times(int64_t R, int64_t K, const T* weight, int64_t stride, const T* x, int64_t x_stride,
                const T* bias, T* out, int64_t out_stride) {
  for (int64_t r = 0; r < R; ++r, weight += stride) {
    Vec<T> acc[M][1];
    set_zero(acc);
    dot_accumulate<M, 1>(acc, K, x, x_stride, weight, stride);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) out[m * out_stride + r] = sum(acc[m][0]) + (bias ? bias[r] : T(0));
  }
}

template <class T>
void rows_times(int64_t R, int64_t K, const T* weight, int64_t stride, const T* x, const T* bias, T* out) {
  rows_times<1, T>(R, K, weight, stride, x, 0, bias, out, 0);
}

// out[V vectors] (+)= sum over r of d[r] weight[r, .]; n elements in the last vector.
template <int V, class T>
void sum_of_vectors(int64_t R, const T* d, const T* weight, int64_t stride, int64_t n, T* out, bool add) {
  constexpr int w = Vec<T>::size;
  const auto left = [&](int v) { return v < V - 1 ? w : n; };
  Vec<T> acc[V];
  set_zero(acc);
  for (int64_t r = 0; r < R; ++r) {
    const Vec<T> x(d[r]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[v] = acc[v] + x * Vec<T>::load(weight + r * stride + v * w, left(v));
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    if (add) acc[v] = acc[v] + Vec<T>::load(out + v * w, left(v));
    acc[v].store(out + v * w, left(v));
  }
}

// out[K] (+)= d[R] weight[R, K].
template <class T>
void sum_of_rows(int64_t R, int64_t K, const T* d, const T* weight, int64_t stride, T* out, bool add) {
  constexpr int w = Vec<T>::size;
  for (; K >= 8 * w; K -= 8 * w, weight += 8 * w, out += 8 * w)
    sum_of_vectors<8>(R, d, weight, stride, w, out, add);
  const int64_t n = K - (ceil_div(K, w) - 1) * w;
  with_count<8>(ceil_div(K, w), [&]<int V>() { sum_of_vectors<V>(R, d, weight, stride, n, out, add); });
}

// s[p], p < padded P, from the products of the frame [K, padded P] and the state's term [P] or [A].
template <class T>
void scores(const AttentionLstm& q, const T* products, const T* term, T* s) {
  constexpr int w = Vec<T>::size;
  const int64_t P = q.positions, stride = padded<T>(P);
  const T* v = typed<T>(q.v);
  for (int64_t p = 0; p < P; p += w) {
    Vec<T> at(T(0));
    if (q.additive) {
      for (int64_t a = 0; a < q.energies; ++a)
        at = at + Vec<T>(v[a]) * tanh(Vec<T>::load(products + a * stride + p) + Vec<T>(term[a]));
    } else {
      at = Vec<T>::load(products + p) + Vec<T>::load(term + p, P - p);
    }
    at.store(s + p);
  }
}

template <class T>
void copy(int64_t n, const T* from, T* to) {
  std::memcpy(to, from, n * sizeof(T));
}

// The workspace of a pass, and when threads are worth it.
template <class T>
class SequencePass {
 public:
  SequencePass(const AttentionLstm& q, int64_t sample_elements, int64_t thread_elements, int threads,
               Carver& shared)
      : q_(q),
        projections_(q, shared),
        sample_elements_(sample_elements),
        samples_(shared.take<T>(q.batch * sample_elements)),
        threads_(threads, shared, [&](Carver& own) {
          own.take<T>(maximum(thread_elements, Projections<T>::thread_elements(q)));
        }) {}

 protected:
  static constexpr int w = Vec<T>::size;

  static bool worth_it(int64_t products) { return products > kSerialProducts; }
  int64_t products_per_step() const {
    return q_.batch * (q_.hidden_size * (q_.gate_rows() + q_.terms()) +
                       q_.positions * (q_.energies + q_.channels + (q_.hoisted ? q_.gate_rows() : 0)));
  }
  // Whether all samples share reads of weight_ih, or a thread takes whole steps of its samples.
  bool shares_weight() const { return q_.flatten && !q_.hoisted; }
  bool ended(int64_t b, int64_t t) const { return q_.lengths && t >= q_.lengths[b]; }
  T* sample(int64_t b) const { return samples_ + b * sample_elements_; }

  const AttentionLstm& q_;
  const Projections<T> projections_;
  const int64_t sample_elements_;
  T* const samples_;
  const ThreadParts threads_;
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
