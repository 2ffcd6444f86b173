// The backward of LSTM and GRU cells: the pointwise half, then two kinds of product.
//
//   grad_input = grad_gates weight_ih,   grad_hx = grad_gates weight_hh       [B, G H] [G H, N]
//   grad_weight_ih = grad_gates^T input, grad_weight_hh = grad_gates^T hx     [G H, B] [B, N]
//
// `multiply` serves both, since a has a stride for either dimension: panels of b, w V columns wide, are
// copied in blocks of K that stay in the first-level cache, and rows of a go past them. For a few rows (M <=
// kFewRows) nothing is used twice, so b is read where it lies, in stripes along its rows.
//
// Bytes: weights once for each of the two gradients that read them, weight gradients written once.
#pragma once

#include "cpu/rnn_forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int kColumns = 4;  // vectors in a panel
constexpr int64_t kFewRows = 4;
constexpr int64_t kStripe = 1024;  // columns of a stripe

template <class T, class S>
struct GatesAt {
  const GatesBackward& p;
  int64_t row, unit, units;

  FUSEDNN_INLINE Vec<T> gate(int g) const {
    return Vec<T>::load(static_cast<const S*>(p.gates) + (row * 4 + g) * p.hidden_size + unit, units);
  }
  FUSEDNN_INLINE Vec<T> state(const Rows& rows) const {
    if (!rows.data) return Vec<T>(T(0));
    return State<T, S>{const_cast<void*>(rows.data), p.wide_state}.load(row * rows.stride + unit, units);
  }
  FUSEDNN_INLINE void store(void* out, int64_t width, int g, Vec<T> x) const {
    x.store(static_cast<T*>(out) + (row * width + g) * p.hidden_size + unit, units);
  }
};

template <class T, class S>
FUSEDNN_INLINE void lstm_gates_backward(const GatesAt<T, S>& at) {
  const GatesBackward& p = at.p;
  const auto d =
      math::lstm_backward(at.state(p.grad_h), at.state(p.grad_c), at.gate(0), at.gate(1), at.gate(2),
                          at.gate(3), at.state(p.state), at.state(Rows{p.c, p.hidden_size}));
  at.store(p.grad_gates, 4, 0, d.i);
  at.store(p.grad_gates, 4, 1, d.f);
  at.store(p.grad_gates, 4, 2, d.g);
  at.store(p.grad_gates, 4, 3, d.o);
  at.store(p.grad_state, 1, 0, d.c_prev);
}

template <class T, class S>
FUSEDNN_INLINE void gru_gates_backward(const GatesAt<T, S>& at) {
  const GatesBackward& p = at.p;
  const auto d = math::gru_backward(at.state(p.grad_h), at.gate(0), at.gate(1), at.gate(2), at.gate(3),
                                    at.state(p.state));
  at.store(p.grad_gates, 3, 0, d.r);
  at.store(p.grad_gates, 3, 1, d.z);
  at.store(p.grad_gates, 3, 2, d.x_n);
  at.store(p.grad_gates_h, 3, 0, d.r);
  at.store(p.grad_gates_h, 3, 1, d.z);
  at.store(p.grad_gates_h, 3, 2, d.h_n);
  at.store(p.grad_state, 1, 0, d.h_prev);
}

template <Cell cell, class T, class S>
void gates_backward(const GatesBackward& p, const Parallel& parallel) {
  const int64_t H = p.hidden_size;
  parallel(p.batch, p.batch * H > 4096, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t unit = 0; unit < H; unit += Vec<T>::size) {
        const GatesAt<T, S> at{p, row, unit, minimum(Vec<T>::size, H - unit)};
        if constexpr (cell == Cell::lstm)
          lstm_gates_backward(at);
        else
          gru_gates_backward(at);
      }
    }
  });
}

// out[M, n] (+)= a[M, K] b[K, n], M <= kFewRows: four rows of b pass by the outputs at a time.
template <int M, class T, class S>
void multiply_few_rows(int64_t n, int64_t K, Strided<T> a, const S* b, int64_t b_stride, T* out,
                       int64_t out_stride, bool accumulate) {
  constexpr int w = Vec<T>::size;
  if (!accumulate)
    for (int m = 0; m < M; ++m) std::memset(out + m * out_stride, 0, n * sizeof(T));
  constexpr int rows = 4;
  for (int64_t k = 0; k < K; k += rows) {
    const S* from[rows];
    Vec<T> x[M][rows];
    for (int r = 0; r < rows; ++r) {
      const bool real = k + r < K;
      from[r] = b + (real ? k + r : k) * b_stride;
      for (int m = 0; m < M; ++m) x[m][r] = Vec<T>(real ? *a.at(m, k + r).data : T(0));
    }
    const int real_rows = static_cast<int>(minimum(rows, K - k));
    const auto step = [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      Vec<T> acc[M];
      for (int m = 0; m < M; ++m) acc[m] = Vec<T>::load(out + m * out_stride + j, count);
      for (int r = 0; r < real_rows; ++r) {
        const Vec<T> y = Vec<T>::load(from[r] + j, count);
        for (int m = 0; m < M; ++m) acc[m] = acc[m] + x[m][r] * y;
      }
      for (int m = 0; m < M; ++m) acc[m].store(out + m * out_stride + j, count);
    };
    int64_t j = 0;
    if (real_rows == rows) {
      for (; j + w <= n; j += w) {
        Vec<T> acc[M];
        for (int m = 0; m < M; ++m) acc[m] = Vec<T>::load(out + m * out_stride + j);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) {
          const Vec<T> y = Vec<T>::load(from[r] + j);
          for (int m = 0; m < M; ++m) acc[m] = acc[m] + x[m][r] * y;
        }
        for (int m = 0; m < M; ++m) acc[m].store(out + m * out_stride + j);
      }
    }
    for (; j < n; j += w) step(j, minimum(w, n - j));
  }
}

template <class T>
constexpr size_t product_workspace_bytes() {
  constexpr int columns = kColumns * Vec<T>::size;
  return (kBlockK + kRowsAtMost) * columns * sizeof(T);  // panel block, results
}

// One panel of columns for one block of rows.
template <class T, class S>
void multiply_block(const Product& p, int64_t row, int64_t rows, int64_t column, char* workspace) {
  constexpr int columns = kColumns * Vec<T>::size;
  const int64_t real = minimum(columns, p.N - column);
  const Strided<T> a{static_cast<const T*>(p.a), p.a_row_stride, p.a_k_stride};
  T* panel = reinterpret_cast<T*>(workspace);
  T* out = static_cast<T*>(p.out) + row * p.N + column;
  const bool whole = real == columns;
  T* c = whole ? out : panel + kBlockK * columns;
  const int64_t c_stride = whole ? p.N : columns;
  if (!whole && p.accumulate)
    for (int64_t m = 0; m < rows; ++m) std::memcpy(c + m * columns, out + m * p.N, real * sizeof(T));
  for (int64_t k = 0; k < p.K; k += kBlockK) {
    const int64_t depth = minimum(kBlockK, p.K - k);
    pack_panel(depth, real, columns, static_cast<const S*>(p.b.data) + k * p.b.stride + column, p.b.stride,
               panel);
    tiles<kColumns>(rows, depth, a.at(row, k), panel, columns, c, c_stride, kColumns - 1,
                    p.accumulate || k > 0);
  }
  if (!whole)
    for (int64_t m = 0; m < rows; ++m) std::memcpy(out + m * p.N, c + m * columns, real * sizeof(T));
}

template <class T, class S>
void multiply(const Product& p, const Parallel& parallel) {
  const bool worth_it = p.M * p.N * p.K > kSerialWork;
  const S* b = static_cast<const S*>(p.b.data);
  T* out = static_cast<T*>(p.out);
  if (p.M <= kFewRows) {
    parallel(ceil_div(p.N, kStripe), worth_it, [&](int64_t begin, int64_t end, int) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t j = s * kStripe, n = minimum(kStripe, p.N - j);
        const Strided<T> a{static_cast<const T*>(p.a), p.a_row_stride, p.a_k_stride};
        switch (p.M) {
          case 1:
            multiply_few_rows<1>(n, p.K, a, b + j, p.b.stride, out + j, p.N, p.accumulate);
            break;
          case 2:
            multiply_few_rows<2>(n, p.K, a, b + j, p.b.stride, out + j, p.N, p.accumulate);
            break;
          case 3:
            multiply_few_rows<3>(n, p.K, a, b + j, p.b.stride, out + j, p.N, p.accumulate);
            break;
          default:
            multiply_few_rows<4>(n, p.K, a, b + j, p.b.stride, out + j, p.N, p.accumulate);
        }
      }
    });
    return;
  }
  constexpr int columns = kColumns * Vec<T>::size;
  const int64_t panels = ceil_div(p.N, columns), row_blocks = ceil_div(p.M, kRowsAtMost);
  parallel(panels * row_blocks, worth_it, [&](int64_t begin, int64_t end, int thread) {
    char* workspace = static_cast<char*>(p.workspace) + thread * product_workspace_bytes<T>();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / panels * kRowsAtMost;
      multiply_block<T, S>(p, row, minimum(kRowsAtMost, p.M - row), task % panels * columns, workspace);
    }
  });
}

template <class T>
void sum_rows(int64_t M, int64_t N, const void* a, void* out, const Parallel& parallel) {
  constexpr int w = Vec<T>::size;
  parallel(ceil_div(N, w), M * N > kSerialWork, [&](int64_t begin, int64_t end, int) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t j = block * w, n = minimum(w, N - j);
      const T* from = static_cast<const T*>(a) + j;
      Vec<T> total(T(0));
      for (int64_t m = 0; m < M; ++m) total = total + Vec<T>::load(from + m * N, n);
      total.store(static_cast<T*>(out) + j, n);
    }
  });
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
