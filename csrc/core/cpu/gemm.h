// Small matrix products on register tiles, for operands that the caller has laid out.
//
//   tile             C[M, V w] (+)= A[M, K] B[K, V w]
//                    Outer products: V vectors of B times M broadcast elements of A; M V accumulators, one load
//                    of B for M products.
//   dot_accumulate   c[M, R] += A[M, K] W[R, K]^T, lane by lane
//                    Both along K: no packing, for a few rows of A. Each weight is read once, so memory is the
//                    limit.
//
// A tile starts from zero and is added to C at its end, so that a sum over K is one of blocks: its rounding
// error grows with kBlockK and with the number of blocks, not with K.
//
// w is the vector width. With 16 registers (SSE2, AVX2) M V = 12, with 32 (AVX-512) M V = 24.
#pragma once

#include "core/cpu/vec.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int kAccumulators = FUSEDNN_VECTOR_BYTES == 64 ? 24 : 12;
// Rows of B at a time: four vectors of each, 32 KiB, stay in the first-level cache.
constexpr int64_t kBlockK = FUSEDNN_VECTOR_BYTES == 64 ? 128 : 256;
constexpr int64_t kPrefetchRows = 16;  // of a B that is read where it lies

template <class T>
struct Strided {  // element (row, k) at data + row * row_stride + k * k_stride
  const T* data;
  int64_t row_stride, k_stride;
  FUSEDNN_INLINE Strided at(int64_t row, int64_t k) const {
    return {data + row * row_stride + k * k_stride, row_stride, k_stride};
  }
};

// Asks for the cache lines of C[M, V w] while the sums that will be stored there are being made: a store that
// misses would hold up those behind it.
template <int M, int V, class T>
FUSEDNN_INLINE void prefetch_tile(const T* c, int64_t c_stride) {
  constexpr int line = 64 / sizeof(T);
#pragma GCC unroll 24
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < V * Vec<T>::size; j += line) __builtin_prefetch(c + m * c_stride + j, 1);
}

enum class Into {  // how C takes a tile's sums
  overwrite,
  add,
  stream,  // overwrite, past the caches: for a C that is larger than they are; its rows aligned to vectors
};

// What a tile does at each row of B beside its sums, so that B, which only the first tile fetches from afar,
// keeps coming.
struct OnlySums {
  template <class T, int V, class S>
  FUSEDNN_INLINE void row(int64_t, const S*, const Vec<T> (&)[V]) const {}
};
template <class T>
struct CopyPanel {  // leaves B in panel[K, V w] for the tiles below, in no pass of its own
  T* panel;
  int64_t b_stride;
  template <class, int V, class S>
  FUSEDNN_INLINE void row(int64_t k, const S* b, const Vec<T> (&bs)[V]) const {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      __builtin_prefetch(b + kPrefetchRows * b_stride + v * Vec<T>::size);
      bs[v].store(panel + (k * V + v) * Vec<T>::size);
    }
  }
};
struct PrefetchNext {  // asks for a cache line of each row of the B that comes next
  const char* line = nullptr;
  int64_t row_bytes = 0;
  template <class T, int V, class S>
  FUSEDNN_INLINE void row(int64_t k, const S*, const Vec<T> (&)[V]) const {
    __builtin_prefetch(line + k * row_bytes, 0, 2);
  }
};

template <class S>
PrefetchNext prefetch_next(const S* b, int64_t stride) {
  return {reinterpret_cast<const char*>(b), stride * static_cast<int64_t>(sizeof(S))};
}

// The last vector of a row of C may lie further on than its neighbours: `last` counts vectors from the first.
// `bias`, if not null, is a row that Into::add adds in place of C's own.
template <int M, int V, class T, class S, class AtRow = OnlySums>
void tile(int64_t K, Strided<T> a, const S* b, int64_t b_stride, T* c, int64_t c_stride, int last, Into into,
          AtRow at_row = {}, const T* bias = nullptr) {
  constexpr int w = Vec<T>::size;
  Vec<T> acc[M][V];
  const T* added = bias ? bias : c;
  const int64_t added_stride = bias ? 0 : c_stride;
  const auto place = [&](int64_t stride, int m, int v) { return m * stride + (v < V - 1 ? v : last) * w; };
  const auto at = [&](int m, int v) { return c + place(c_stride, m, v); };
  set_zero(acc);
  const T* rows[M];
#pragma GCC unroll 24
  for (int m = 0; m < M; ++m) rows[m] = a.data + m * a.row_stride;
  if (into != Into::stream) prefetch_tile<M, V>(c, c_stride);
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> bs[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) bs[v] = Vec<T>::load(b + v * w);
    at_row.template row<T, V>(k, b, bs);
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
    for (int v = 0; v < V; ++v) {
      if (into == Into::stream)
        acc[m][v].stream(at(m, v));
      else
        (into == Into::add ? Vec<T>::load(added + place(added_stride, m, v)) + acc[m][v] : acc[m][v])
            .store(at(m, v));
    }
}

// C[rows, V w] (+)= A B for any number of rows. `next`: the B[K, V w] of the next call, if it is known; tile t
// asks for line t of its rows.
template <int V, class T, class S>
void tiles(int64_t rows, int64_t K, Strided<T> a, const S* b, int64_t b_stride, T* c, int64_t c_stride,
           int last, Into into, PrefetchNext next = {}) {
  constexpr int M = kAccumulators / V;
  int64_t lines = next.line ? V * Vec<T>::size * sizeof(S) / 64 : 0;
  int64_t m = 0;
  for (; m + M <= rows; m += M) {
    const auto run = [&](auto at_row) {
      tile<M, V>(K, a.at(m, 0), b, b_stride, c + m * c_stride, c_stride, last, into, at_row);
    };
    if (lines-- > 0) {
      run(next);
      next.line += 64;
    } else {
      run(OnlySums{});
    }
  }
  with_count<M - 1>(rows - m, [&]<int N>() {
    tile<N, V>(K, a.at(m, 0), b, b_stride, c + m * c_stride, c_stride, last, into);
  });
}

// C[M, V w] (+)= acc.
template <int M, int V, class T>
FUSEDNN_INLINE void store_tile(const Vec<T> (&acc)[M][V], T* c, int64_t c_stride, bool accumulate) {
#pragma GCC unroll 12
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* to = c + m * c_stride + v * Vec<T>::size;
      (accumulate ? Vec<T>::load(to) + acc[m][v] : acc[m][v]).store(to);
    }
}

// Adds dot products of M rows of a with R rows of w over [0, K), lane by lane.
template <int M, int R, class T, class S>
FUSEDNN_INLINE void dot_accumulate(Vec<T> (&acc)[M][R], int64_t K, const T* a, int64_t a_stride, const S* w,
                                   int64_t w_stride) {
  constexpr int width = Vec<T>::size;
  const auto step = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    Vec<T> x[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) x[m] = Vec<T>::load(a + m * a_stride + k, n);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> weight = Vec<T>::load(w + r * w_stride + k, n);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][r] = acc[m][r] + x[m] * weight;
    }
  };
  int64_t k = 0;
  for (; k + width <= K; k += width) step(k, width);
  if (k < K) step(k, K - k);
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
