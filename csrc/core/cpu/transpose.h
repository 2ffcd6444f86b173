// Transposes of w x w elements in registers, w = the vector's width.
#pragma once

#include "core/cpu/vec.h"

namespace fusednn::cpu::FUSEDNN_ISA {

template <int w>
struct Interleave;  // low: a0 b0 a1 b1 ..., high: the upper halves likewise

template <>
struct Interleave<2> {
  template <class N>
  static FUSEDNN_INLINE N low(N a, N b) {
    return __builtin_shufflevector(a, b, 0, 2);
  }
  template <class N>
  static FUSEDNN_INLINE N high(N a, N b) {
    return __builtin_shufflevector(a, b, 1, 3);
  }
};

template <>
struct Interleave<4> {
  template <class N>
  static FUSEDNN_INLINE N low(N a, N b) {
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  }
  template <class N>
  static FUSEDNN_INLINE N high(N a, N b) {
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  }
};

template <>
struct Interleave<8> {
  template <class N>
  static FUSEDNN_INLINE N low(N a, N b) {
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  }
  template <class N>
  static FUSEDNN_INLINE N high(N a, N b) {
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  }
};

template <>
struct Interleave<16> {
  template <class N>
  static FUSEDNN_INLINE N low(N a, N b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
  template <class N>
  static FUSEDNN_INLINE N high(N a, N b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
};

// log2(w) rounds, each of which interleaves row i with row i + w / 2.
template <class T>
FUSEDNN_INLINE void transpose(Vec<T> (&x)[Vec<T>::size]) {
  constexpr int w = Vec<T>::size;
#pragma GCC unroll 4
  for (int round = 1; round < w; round *= 2) {
    Vec<T> y[w];
#pragma GCC unroll 8
    for (int i = 0; i < w / 2; ++i) {
      y[2 * i] = Vec<T>(Interleave<w>::low(x[i].v, x[i + w / 2].v));
      y[2 * i + 1] = Vec<T>(Interleave<w>::high(x[i].v, x[i + w / 2].v));
    }
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) x[i] = y[i];
  }
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
