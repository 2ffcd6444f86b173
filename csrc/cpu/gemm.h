// Small matrix products on register tiles, for operands that the caller has laid out.
//
//   tile    C[M, V w] (+)= A[M, K] B[K, V w]    outer products: V vectors of B times M broadcast elements of
//   A;
//                                               M V accumulators, one load of B per M products
//   dot     c[M, R] = A[M, K] W[R, K]^T         both along K: no packing, for a few rows of A; each weight is
//                                               read once, so memory is the limit
//
// A tile starts from zero and is added to C at its end, so that a sum over K is one of blocks: its rounding
// error grows with kBlockK and with the number of blocks, not with K.
//
// w is the vector width. With 16 registers (SSE2, AVX2) M V = 12, with 32 (AVX-512) M V = 24.
#pragma once

#include "cpu/vec.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int kAccumulators = FUSEDNN_VECTOR_BYTES == 64 ? 24 : 12;
constexpr int64_t kBlockK = 256;  // rows of B at a time: V w kBlockK elements stay in the first-level cache

template <class T>
struct Strided {  // element (row, k) at data + row * row_stride + k * k_stride
  const T* data;
  int64_t row_stride, k_stride;
  FUSEDNN_INLINE Strided at(int64_t row, int64_t k) const {
    return {data + row * row_stride + k * k_stride, row_stride, k_stride};
  }
};

// The last vector of a row of C may lie further on than its neighbours: `last` counts vectors from the first.
template <int M, int V, class T, class S>
void tile(int64_t K, Strided<T> a, const S* b, int64_t b_stride, T* c, int64_t c_stride, int last,
          bool accumulate) {
  constexpr int w = Vec<T>::size;
  Vec<T> acc[M][V];
  const auto at = [&](int m, int v) { return c + m * c_stride + (v < V - 1 ? v : last) * w; };
#pragma GCC unroll 24
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[m][v] = Vec<T>(T(0));
  const T* rows[M];
#pragma GCC unroll 24
  for (int m = 0; m < M; ++m) rows[m] = a.data + m * a.row_stride;
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> bs[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) bs[v] = Vec<T>::load(b + v * w);
#pragma GCC unroll 24
    for (int m = 0; m < M; ++m) {
      const Vec<T> x(rows[m][k * a.k_stride]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] = acc[m][v] + x * bs[v];
    }
    b += b_stride;
  }
#pragma GCC unroll 24
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) (accumulate ? Vec<T>::load(at(m, v)) + acc[m][v] : acc[m][v]).store(at(m, v));
}

// C[rows, V w] (+)= A B for any number of rows.
template <int V, class T, class S>
void tiles(int64_t rows, int64_t K, Strided<T> a, const S* b, int64_t b_stride, T* c, int64_t c_stride,
           int last, bool accumulate) {
  constexpr int M = kAccumulators / V;
  int64_t m = 0;
  for (; m + M <= rows; m += M)
    tile<M, V>(K, a.at(m, 0), b, b_stride, c + m * c_stride, c_stride, last, accumulate);
  const Strided<T> rest = a.at(m, 0);
  T* c_rest = c + m * c_stride;
  switch (rows - m) {
#define FUSEDNN_CASE(N)                                                                        \
  case N:                                                                                      \
    if constexpr (N < M) tile<N, V>(K, rest, b, b_stride, c_rest, c_stride, last, accumulate); \
    break;
    FUSEDNN_CASE(1)
    FUSEDNN_CASE(2)
    FUSEDNN_CASE(3)
    FUSEDNN_CASE(4)
    FUSEDNN_CASE(5)
    FUSEDNN_CASE(6)
    FUSEDNN_CASE(7)
#undef FUSEDNN_CASE
    default:
      break;
  }
}

// Copies B[K, columns] (rows of `stride`) to a panel [K, width], zeros beyond `columns`.
template <class T, class S>
void pack_panel(int64_t K, int64_t columns, int width, const S* b, int64_t stride, T* panel) {
  for (int64_t k = 0; k < K; ++k, b += stride, panel += width) {
    for (int j = 0; j < width; j += Vec<T>::size) {
      const int64_t left = columns - j;
      (left > 0 ? Vec<T>::load(b + j, left) : Vec<T>(T(0))).store(panel + j);
    }
  }
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
