// Transposes of w x w elements in registers, w = the vector's width.
#pragma once

#include <type_traits>
#include <utility>

#include "core/cpu/vec.h"

namespace fusednn::cpu::FUSEDNN_ISA {

// a0 b0 a1 b1 ..., from element `first` on.
template <int first, class Native, int... i>
FUSEDNN_INLINE Native interleave(Native a, Native b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * int{sizeof...(i)})...);
}

// log2(w) rounds, each of which interleaves row i with row i + w / 2.
template <class T>
FUSEDNN_INLINE void transpose(Vec<T> (&x)[Vec<T>::size]) {
  constexpr int w = Vec<T>::size;
  constexpr std::make_integer_sequence<int, w> elements;
#pragma GCC unroll 4
  for (int round = 1; round < w; round *= 2) {
    Vec<T> y[w];
#pragma GCC unroll 8
    for (int i = 0; i < w / 2; ++i) {
      y[2 * i] = Vec<T>(interleave<0>(x[i].v, x[i + w / 2].v, elements));
      y[2 * i + 1] = Vec<T>(interleave<w / 2>(x[i].v, x[i + w / 2].v, elements));
    }
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) x[i] = y[i];
  }
}

// to[k][u] = from[u][k] for w x w elements, w = the width of Vec<T>.
template <class T, class S>
FUSEDNN_INLINE void transpose(const S* from, int64_t from_stride, S* to, int64_t to_stride) {
  constexpr int w = Vec<T>::size;
  if constexpr (std::is_same_v<S, T>) {
    Vec<T> x[w];
    for (int u = 0; u < w; ++u) x[u] = Vec<T>::load(from + u * from_stride);
    transpose<T>(x);
    for (int k = 0; k < w; ++k) x[k].store(to + k * to_stride);
  } else {
    for (int u = 0; u < w; ++u)
      for (int k = 0; k < w; ++k) to[k * to_stride + u] = from[u * from_stride + k];
  }
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
