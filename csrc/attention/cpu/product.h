// C[M, N] (+)= A[M, K] B[K, N] on register tiles, for operands in the core's own memory: N is padded to whole
// vectors, rows of B lie together.
//
// A tile is 12 rows by 2 vectors with 32 registers, 6 by 2 with 16: it takes little of B for many products,
// so that B may come from the second-level cache, and sums over K are long. K is cut into blocks, whose sums
// are added up.
#pragma once

#include "core/cpu/gemm.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int kWide = 2;         // vectors of a tile
constexpr int64_t kDepth = 128;  // a longer chain of sums would err more than torch's

template <int V>
constexpr int tile_rows() {
  return minimum(kAccumulators / V, 12);
}

// Tiles of nearly equal height. `bias`: as for a tile.
template <int V, class T>
void multiply_panel(int64_t rows, int64_t K, Strided<T> a, const T* b, int64_t b_stride, T* c,
                    int64_t c_stride, Into into, const T* bias = nullptr) {
  constexpr int M = tile_rows<V>();
  for (int64_t m = 0, tiles = ceil_div(rows, M); tiles > 0; --tiles) {
    const int64_t height = ceil_div(rows - m, tiles);
    with_count<M>(height, [&]<int N>() {
      tile<N, V>(K, a.at(m, 0), b, b_stride, c + m * c_stride, c_stride, V - 1, into, OnlySums{}, bias);
    });
    m += height;
  }
}

// N in vectors.
template <class T>
void multiply(int64_t rows, int64_t vectors, int64_t K, Strided<T> a, const T* b, int64_t b_stride, T* c,
              int64_t c_stride, Into into) {
  constexpr int w = Vec<T>::size;
  for (int64_t k = 0; k < K; k += kDepth) {
    const int64_t depth = minimum(kDepth, K - k);
    const Strided<T> part = a.at(0, k);
    const T* rows_of_b = b + k * b_stride;
    int64_t v = 0;
    for (; v + kWide <= vectors; v += kWide)
      multiply_panel<kWide>(rows, depth, part, rows_of_b + v * w, b_stride, c + v * w, c_stride, into);
    const T* rest = rows_of_b + v * w;
    if (v < vectors) multiply_panel<1>(rows, depth, part, rest, b_stride, c + v * w, c_stride, into);
    into = Into::add;
  }
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
