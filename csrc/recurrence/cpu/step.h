// The pieces of a step: products of a weight and a vector, scores and their softmax.
#pragma once

#include "core/cpu/vec_math.h"
#include "recurrence/cpu/project.h"

namespace fusednn::cpu::FUSEDNN_ISA {

template <class T>
FUSEDNN_INLINE const T* typed(const void* p, int64_t offset = 0) {
  return p ? static_cast<const T*>(p) + offset : nullptr;
}
template <class T>
FUSEDNN_INLINE T* typed(void* p, int64_t offset = 0) {
  return p ? static_cast<T*>(p) + offset : nullptr;
}

template <class T>
FUSEDNN_INLINE Vec<T> load_or_zero(const T* p, int64_t i, int64_t n) {
  return p ? Vec<T>::load(p + i, n) : Vec<T>(T(0));
}

// out[m][R] = weight[R, K] x[m][K] + bias for M vectors x. Row after row, as they lie in memory: rows side by
// side would be so many streams, which no prefetcher follows, and sums of different rows overlap even so.
template <int M, class T>
void rows_times(int64_t R, int64_t K, const T* weight, int64_t stride, const T* const (&x)[M], const T* bias,
                T* const (&out)[M]) {
  constexpr int w = Vec<T>::size;
  for (int64_t r = 0; r < R; ++r, weight += stride) {
    Vec<T> acc[M];
    const auto step = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
      const Vec<T> row = Vec<T>::load(weight + k, n);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) acc[m] = acc[m] + row * Vec<T>::load(x[m] + k, n);
    };
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) acc[m] = Vec<T>(T(0));
    int64_t k = 0;
    for (; k + w <= K; k += w) step(k, w);
    if (k < K) step(k, K - k);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) out[m][r] = sum(acc[m]) + (bias ? bias[r] : T(0));
  }
}

template <class T>
void rows_times(int64_t R, int64_t K, const T* weight, int64_t stride, const T* x, const T* bias, T* out) {
  rows_times<1, T>(R, K, weight, stride, {x}, bias, {out});
}

// out[V vectors] (+)= sum over r of d[r] weight[r, .]; n elements in the last vector.
template <int V, class T>
void sum_of_vectors(int64_t R, const T* d, const T* weight, int64_t stride, int64_t n, T* out, bool add) {
  constexpr int w = Vec<T>::size;
  const auto left = [&](int v) { return v < V - 1 ? w : n; };
  Vec<T> acc[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) acc[v] = Vec<T>(T(0));
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
  switch (ceil_div(K, w)) {
#define FUSEDNN_CASE(V)                                   \
  case V:                                                 \
    sum_of_vectors<V>(R, d, weight, stride, n, out, add); \
    break;
    FUSEDNN_CASE(1)
    FUSEDNN_CASE(2)
    FUSEDNN_CASE(3)
    FUSEDNN_CASE(4)
    FUSEDNN_CASE(5)
    FUSEDNN_CASE(6)
    FUSEDNN_CASE(7)
    FUSEDNN_CASE(8)
#undef FUSEDNN_CASE
    default:
      break;
  }
}

template <class T>
struct Largest;
template <>
struct Largest<float> {
  static constexpr float value = __FLT_MAX__;
};
template <>
struct Largest<double> {
  static constexpr double value = __DBL_MAX__;
};

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

// In place: s[P] to softmax(s / temperature), 0 if all are -inf; s is padded, and becomes 0 there.
template <class T>
void softmax(int64_t P, T temperature, T* s) {
  constexpr int w = Vec<T>::size;
  constexpr T infinity = static_cast<T>(__builtin_inf());
  const int64_t end = padded<T>(P);
  for (int64_t p = P; p < end; ++p) s[p] = -infinity;
  Vec<T> most = Vec<T>(-infinity);
  for (int64_t p = 0; p < end; p += w) {
    const Vec<T> x = Vec<T>::load(s + p);
    most = select(x > most, x, most);
  }
  T lanes[w], largest = -infinity;
  most.store(lanes);
  for (int i = 0; i < w; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  if (largest == -infinity) largest = T(0);
  Vec<T> total(T(0));
  for (int64_t p = 0; p < end; p += w) {
    const Vec<T> below = Vec<T>::load(s + p) - Vec<T>(largest);
    // -inf is gone at any temperature, an infinite one too.
    const auto gone = below < Vec<T>(-Largest<T>::value);
    const Vec<T> weight = select(gone, Vec<T>(T(0)), exp(below / Vec<T>(temperature)));
    total = total + weight;
    weight.store(s + p);
  }
  const T t = sum(total);
  const Vec<T> divisor(t == T(0) ? T(1) : t);
  for (int64_t p = 0; p < end; p += w) (Vec<T>::load(s + p) / divisor).store(s + p);
}

template <class T>
void copy(int64_t n, const T* from, T* to) {
  std::memcpy(to, from, n * sizeof(T));
}

FUSEDNN_INLINE bool ended(const AttentionLstm& q, int64_t b, int64_t t) {
  return q.lengths && t >= q.lengths[b];
}

// Whether the samples' threads can take the whole step, or all samples share reads of weight_ih.
FUSEDNN_INLINE bool shares_weight(const AttentionLstm& q) { return q.flatten && !q.hoisted; }

}  // namespace fusednn::cpu::FUSEDNN_ISA
