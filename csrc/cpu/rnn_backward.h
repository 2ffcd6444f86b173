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
constexpr int kRowsOfB = 4;             // that pass at a time
constexpr int64_t kFewRowsDepth = 128;  // products in a sum before it is added to the result
constexpr int64_t kPanelsAtOnce = 4;    // with few rows: enough neighbours for the prefetcher
constexpr int64_t kStripe = 1024;       // columns of a stripe

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

// part[M, n] += x[M, K] b[K, n].
template <int M, class T, class S>
FUSEDNN_INLINE void add_rows(int64_t n, int K, const Vec<T> (&x)[M][kRowsOfB], const S* b, int64_t b_stride,
                             T* part) {
  for (int64_t j = 0; j < n; j += Vec<T>::size) {
    const int64_t count = minimum(Vec<T>::size, n - j);
    Vec<T> acc[M];
    for (int m = 0; m < M; ++m) acc[m] = Vec<T>::load(part + m * kStripe + j);
#pragma GCC unroll 4
    for (int r = 0; r < K; ++r) {
      const Vec<T> y = Vec<T>::load(b + r * b_stride + j, count);
      for (int m = 0; m < M; ++m) acc[m] = acc[m] + x[m][r] * y;
    }
    for (int m = 0; m < M; ++m) acc[m].store(part + m * kStripe + j);
  }
}

// out[M, n] (+)= a[M, K] b[K, n], M <= kFewRows, n <= kStripe: some rows of b at a time pass by a stripe of
// sums. `part` [M, kStripe] holds those of a block of K until they are added to out.
template <int M, class T, class S>
void multiply_few_rows(int64_t n, int64_t K, Strided<T> a, const S* b, int64_t b_stride, T* out,
                       int64_t out_stride, bool accumulate, T* part) {
  for (int64_t k0 = 0; k0 < K; k0 += kFewRowsDepth) {
    const int64_t k1 = minimum(K, k0 + kFewRowsDepth);
    std::memset(part, 0, M * kStripe * sizeof(T));
    for (int64_t k = k0; k < k1; k += kRowsOfB) {
      const int rows = static_cast<int>(minimum(kRowsOfB, k1 - k));
      Vec<T> x[M][kRowsOfB];
      for (int r = 0; r < rows; ++r)
        for (int m = 0; m < M; ++m) x[m][r] = Vec<T>(*a.at(m, k + r).data);
      if (rows == kRowsOfB)
        add_rows<M>(n, kRowsOfB, x, b + k * b_stride, b_stride, part);
      else
        add_rows<M>(n, rows, x, b + k * b_stride, b_stride, part);
    }
    for (int m = 0; m < M; ++m) {
      T* to = out + m * out_stride;
      for (int64_t j = 0; j < n; j += Vec<T>::size) {
        const int64_t count = minimum(Vec<T>::size, n - j);
        const Vec<T> sums = Vec<T>::load(part + m * kStripe + j);
        (accumulate || k0 > 0 ? Vec<T>::load(to + j, count) + sums : sums).store(to + j, count);
      }
    }
  }
}

// Blocks of b that are copied at once: as many columns as rows of a will use them again.
struct Blocking {
  int64_t depth, panels;
};
constexpr int64_t kRowStep = 12;            // rows of a that pass by a block's panels together
constexpr int64_t kBlockBytes = 192 << 10;  // part of a second-level cache

template <class T>
Blocking blocking(int64_t rows, int64_t K) {
  constexpr int64_t panel_row = kColumns * sizeof(Vec<T>);
  const int64_t depth = minimum(K, kBlockK);
  const int64_t panels = rows <= kRowsAtMost ? kPanelsAtOnce : kBlockBytes / (depth * panel_row);
  return {depth, panels < 1 ? 1 : panels};
}

template <class T>
constexpr size_t product_workspace_bytes() {
  constexpr int64_t panel_row = kColumns * sizeof(Vec<T>);
  const int64_t few = kPanelsAtOnce * kBlockK * panel_row;
  const int64_t edge = kRowStep * panel_row, rows = kRowStep * kBlockK * sizeof(T);
  return (few > kBlockBytes ? few : kBlockBytes) + kBlockK * panel_row + edge + rows;
}

// Copies rows of a that lie across memory to [K][kRowStep]: a step in K would otherwise always meet the same
// few sets of the first-level cache.
template <class T>
Strided<T> gather_rows(int64_t rows, int64_t K, Strided<T> a, T* to) {
  for (int64_t k = 0; k < K; ++k)
    for (int64_t m = 0; m < rows; ++m) to[k * kRowStep + m] = a.data[m * a.row_stride + k * a.k_stride];
  return {to, 1, kRowStep};
}

// The rectangle [row, row + rows) x [column, column + columns) of out; `column` is a multiple of a panel.
template <class T, class S>
void multiply_rectangle(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns,
                        T* workspace) {
  constexpr int width = kColumns * Vec<T>::size;
  const Strided<T> a{static_cast<const T*>(p.a), p.a_row_stride, p.a_k_stride};
  const S* b = static_cast<const S*>(p.b.data);
  const Blocking block = blocking<T>(rows, p.K);
  T* edge = workspace + product_workspace_bytes<T>() / sizeof(T) - kRowStep * (width + kBlockK);
  T* a_rows = edge + kRowStep * width;
  for (int64_t j0 = column; j0 < column + columns; j0 += block.panels * width) {
    const int64_t j1 = minimum(column + columns, j0 + block.panels * width);
    for (int64_t k = 0; k < p.K; k += block.depth) {
      const int64_t depth = minimum(block.depth, p.K - k);
      const bool accumulate = p.accumulate || k > 0;
      for (int64_t j = j0; j < j1; j += width)
        pack_panel(depth, minimum(width, j1 - j), width, b + k * p.b.stride + j, p.b.stride,
                   workspace + (j - j0) * depth);
      for (int64_t m = row; m < row + rows; m += kRowStep) {
        const int64_t step = minimum(kRowStep, row + rows - m);
        const Strided<T> a_step = a.k_stride == 1 ? a.at(m, k) : gather_rows(step, depth, a.at(m, k), a_rows);
        for (int64_t j = j0; j < j1; j += width) {
          const T* panel = workspace + (j - j0) * depth;
          T* out = static_cast<T*>(p.out) + m * p.N + j;
          const int64_t real = j1 - j;
          if (real >= width) {
            tiles<kColumns>(step, depth, a_step, panel, width, out, p.N, kColumns - 1, accumulate);
            continue;
          }
          if (accumulate)
            for (int64_t r = 0; r < step; ++r) std::memcpy(edge + r * width, out + r * p.N, real * sizeof(T));
          tiles<kColumns>(step, depth, a_step, panel, width, edge, width, kColumns - 1, accumulate);
          for (int64_t r = 0; r < step; ++r) std::memcpy(out + r * p.N, edge + r * width, real * sizeof(T));
        }
      }
    }
  }
}

// M <= kFewRows: stripes of columns.
template <class T, class S>
void multiply_stripes(const Product& p, bool worth_it, const Parallel& parallel) {
  const Strided<T> a{static_cast<const T*>(p.a), p.a_row_stride, p.a_k_stride};
  parallel(ceil_div(p.N, kStripe), worth_it, [&](int64_t begin, int64_t end, int thread) {
    T* part = reinterpret_cast<T*>(static_cast<char*>(p.workspace) + thread * product_workspace_bytes<T>());
    for (int64_t stripe = begin; stripe < end; ++stripe) {
      const int64_t j = stripe * kStripe, n = minimum(kStripe, p.N - j);
      const S* b = static_cast<const S*>(p.b.data) + j;
      T* out = static_cast<T*>(p.out) + j;
      switch (p.M) {
        case 1:
          multiply_few_rows<1>(n, p.K, a, b, p.b.stride, out, p.N, p.accumulate, part);
          break;
        case 2:
          multiply_few_rows<2>(n, p.K, a, b, p.b.stride, out, p.N, p.accumulate, part);
          break;
        case 3:
          multiply_few_rows<3>(n, p.K, a, b, p.b.stride, out, p.N, p.accumulate, part);
          break;
        default:
          multiply_few_rows<4>(n, p.K, a, b, p.b.stride, out, p.N, p.accumulate, part);
      }
    }
  });
}

template <class T, class S>
void multiply(const Product& p, const Parallel& parallel) {
  const bool worth_it = p.M * p.N * p.K > kSerialWork;
  if (p.M <= kFewRows) return multiply_stripes<T, S>(p, worth_it, parallel);
  constexpr int width = kColumns * Vec<T>::size;
  const bool by_rows = p.M > kRowsAtMost;  // a thread then copies all of b, for rows enough to pay for it
  const int64_t unit = by_rows ? kRowStep : width;
  parallel(ceil_div(by_rows ? p.M : p.N, unit), worth_it, [&](int64_t begin, int64_t end, int thread) {
    T* workspace =
        reinterpret_cast<T*>(static_cast<char*>(p.workspace) + thread * product_workspace_bytes<T>());
    const int64_t first = begin * unit;
    if (by_rows)
      multiply_rectangle<T, S>(p, first, minimum(end * unit, p.M) - first, 0, p.N, workspace);
    else
      multiply_rectangle<T, S>(p, 0, p.M, first, minimum(end * unit, p.N) - first, workspace);
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
      for (int64_t m0 = 0; m0 < M; m0 += kBlockK) {
        Vec<T> part(T(0));
        for (int64_t m = m0; m < minimum(M, m0 + kBlockK); ++m) part = part + Vec<T>::load(from + m * N, n);
        total = total + part;
      }
      total.store(static_cast<T*>(out) + j, n);
    }
  });
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
