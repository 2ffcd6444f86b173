// The backward of LSTM and GRU cells: the pointwise half, then two kinds of product and the biases' sums, all
// in one parallel region: every thread takes its share of each.
//
//   grad_input = grad_gates weight_ih,   grad_hx = grad_gates weight_hh       [B, G H] [G H, N]
//   grad_weight_ih = grad_gates^T input, grad_weight_hh = grad_gates^T hx     [G H, B] [B, N]
//
// `multiply` serves both, since a has a stride for either dimension: panels of b, w V columns wide, are
// copied in blocks of K that stay in the first-level cache, and rows of a go past them. For a few rows (M <=
// kFewRows) nothing is used twice, so b is read where it lies, in stripes along its rows. A sum over K is cut
// the same way whatever the number of threads.
//
// Bytes: weights once for each of the two gradients that read them, weight gradients written once.
#pragma once

#include "rnn/cpu/forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int kColumns = 4;  // vectors in a panel
constexpr int64_t kFewRows = 4;
constexpr int kRowsOfB = 4;             // that pass at a time
constexpr int64_t kFewRowsDepth = 128;  // products in a sum before it is added to the result
constexpr int64_t kStripe = 1024;       // columns of a stripe

struct Range {
  int64_t begin, end;
};

// out[M, N] (+)= a[M, K] b[K, N], b in its own dtype.
struct Product {
  int64_t M, N, K;
  const void* a;
  int64_t a_row_stride, a_k_stride;
  Rows b;
  void* out;  // rows contiguous
  bool accumulate;
};

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

constexpr int64_t kBlockBytes = 192 << 10;  // panels that are copied at once: part of a second-level cache
constexpr size_t kStreamBytes = 16 << 20;   // an out from here on is written past the caches
constexpr int64_t kRowStep = 12;            // rows of a in a step are a multiple of this
constexpr int64_t kGathered = 6 << 10;      // elements of a in a step: part of the first-level cache

template <class T>
constexpr int64_t panel_bytes(int64_t depth) {
  return depth * kColumns * sizeof(Vec<T>);
}

template <class T>
constexpr size_t product_workspace_bytes() {
  const int64_t edge = kRowsAtMost * kColumns * sizeof(Vec<T>), rows = kGathered * sizeof(T);
  return kBlockBytes + panel_bytes<T>(kBlockK) + edge + rows;
}

// What a thread of a product works with.
template <class T>
struct ProductBuffers {
  T *panels, *edge, *rows;
  explicit ProductBuffers(void* workspace)
      : panels(static_cast<T*>(workspace)),
        edge(panels + (kBlockBytes + panel_bytes<T>(kBlockK)) / sizeof(T)),
        rows(edge + kRowsAtMost * kColumns * Vec<T>::size) {}
};

// Rows of a that pass by the panels together, so that a panel is fetched to the first-level cache once for all.
inline int64_t rows_per_step(int64_t depth) {
  if (depth <= kFewRows) return 2 * kRowStep;  // writing is all there is to do: few rows, written far along
  const int64_t fit = kGathered / depth / kRowStep * kRowStep;
  return minimum(fit < kRowStep ? kRowStep : fit, kRowsAtMost);
}

// Copies rows of a that lie across memory to [K][step]: a step in K would otherwise always meet the same few
// sets of the first-level cache.
template <class T>
Strided<T> gather_rows(int64_t rows, int64_t K, Strided<T> a, T* to) {
  if (a.row_stride == 1) {
    for (int64_t k = 0; k < K; ++k) std::memcpy(to + k * rows, a.data + k * a.k_stride, rows * sizeof(T));
  } else {
    for (int64_t k = 0; k < K; ++k)
      for (int64_t m = 0; m < rows; ++m) to[k * rows + m] = a.data[m * a.row_stride + k * a.k_stride];
  }
  return {to, 1, rows};
}

// out[rows, columns] (+)= a panel, where the panel is wider than what is left of out.
template <class T>
void edge_tiles(int64_t rows, int64_t columns, int64_t K, Strided<T> a, const T* panel, T* out,
                int64_t out_stride, Into into, T* edge) {
  constexpr int width = kColumns * Vec<T>::size;
  if (into == Into::add)
    for (int64_t m = 0; m < rows; ++m)
      std::memcpy(edge + m * width, out + m * out_stride, columns * sizeof(T));
  tiles<kColumns>(rows, K, a, panel, width, edge, width, kColumns - 1,
                  into == Into::add ? into : Into::overwrite);
  for (int64_t m = 0; m < rows; ++m) std::memcpy(out + m * out_stride, edge + m * width, columns * sizeof(T));
}

// M <= kRowsAtMost, a's neighbours along K: each panel of b is copied by the first tile that reads it.
template <class T, class S>
void multiply_columns(const Product& p, Range columns, void* workspace) {
  constexpr int width = kColumns * Vec<T>::size, first = kAccumulators / kColumns;
  const ProductBuffers<T> buffers(workspace);
  const Strided<T> a{static_cast<const T*>(p.a), p.a_row_stride, p.a_k_stride};
  for (int64_t k = 0; k < p.K; k += kBlockK) {
    const int64_t depth = minimum(kBlockK, p.K - k);
    const Into into = p.accumulate || k > 0 ? Into::add : Into::overwrite;
    for (int64_t j = columns.begin; j < columns.end; j += width) {
      const S* b = static_cast<const S*>(p.b.data) + k * p.b.stride + j;
      T* out = static_cast<T*>(p.out) + j;
      const int64_t real = minimum(width, columns.end - j);
      if (real < width || p.M < first) {
        pack_panel(depth, real, width, b, p.b.stride, buffers.panels);
        edge_tiles(p.M, real, depth, a.at(0, k), buffers.panels, out, p.N, into, buffers.edge);
        continue;
      }
      tile<first, kColumns>(depth, a.at(0, k), b, p.b.stride, out, p.N, kColumns - 1, into,
                            CopyPanel<T>{buffers.panels, p.b.stride});
      const bool more = j + 2 * width <= columns.end;
      tiles<kColumns>(p.M - first, depth, a.at(first, k), buffers.panels, width, out + first * p.N, p.N,
                      kColumns - 1, into, more ? prefetch_next(b + width, p.b.stride) : PrefetchNext{});
    }
  }
}

// Whether out is written past the caches: it would evict what they hold, and be gone from them itself before
// it is read.
template <class T>
bool streams_out(const Product& p) {
  const bool aligned = reinterpret_cast<uintptr_t>(p.out) % 64 == 0 && p.N * sizeof(T) % 64 == 0;
  return aligned && p.K <= kBlockK && static_cast<size_t>(p.M) * p.N * sizeof(T) >= kStreamBytes;
}

// Rows of out: panels of b are copied some at a time, and all rows of a go past them in steps.
template <class T, class S>
void multiply_rows(const Product& p, Range rows, void* workspace) {
  constexpr int width = kColumns * Vec<T>::size;
  const ProductBuffers<T> buffers(workspace);
  const Strided<T> a{static_cast<const T*>(p.a), p.a_row_stride, p.a_k_stride};
  const S* b = static_cast<const S*>(p.b.data);
  const Into first = p.accumulate ? Into::add : streams_out<T>(p) ? Into::stream : Into::overwrite;
  const int64_t step = rows_per_step(minimum(kBlockK, p.K));
  const int64_t fit = kBlockBytes / panel_bytes<T>(minimum(kBlockK, p.K)),
                block = (fit < 1 ? 1 : fit) * width;
  for (int64_t j0 = 0; j0 < p.N; j0 += block) {
    const int64_t j1 = minimum(p.N, j0 + block);
    for (int64_t k = 0; k < p.K; k += kBlockK) {
      const int64_t depth = minimum(kBlockK, p.K - k);
      const Into into = k > 0 ? Into::add : first;
      for (int64_t j = j0; j < j1; j += width)
        pack_panel(depth, minimum(width, j1 - j), width, b + k * p.b.stride + j, p.b.stride,
                   buffers.panels + (j - j0) * depth);
      for (int64_t m = rows.begin; m < rows.end; m += step) {
        const int64_t count = minimum(step, rows.end - m);
        const Strided<T> a_step =
            a.k_stride == 1 ? a.at(m, k) : gather_rows(count, depth, a.at(m, k), buffers.rows);
        for (int64_t j = j0; j < j1; j += width) {
          const T* panel = buffers.panels + (j - j0) * depth;
          T* out = static_cast<T*>(p.out) + m * p.N + j;
          if (j1 - j < width)
            edge_tiles(count, j1 - j, depth, a_step, panel, out, p.N, into, buffers.edge);
          else
            tiles<kColumns>(count, depth, a_step, panel, width, out, p.N, kColumns - 1, into);
        }
      }
    }
  }
  stream_fence();
}

// M <= kFewRows: columns in stripes.
template <class T, class S>
void multiply_stripes(const Product& p, Range columns, void* workspace) {
  const Strided<T> a{static_cast<const T*>(p.a), p.a_row_stride, p.a_k_stride};
  T* part = static_cast<T*>(workspace);
  for (int64_t j = columns.begin; j < columns.end; j += kStripe) {
    const int64_t n = minimum(kStripe, columns.end - j);
    const S* b = static_cast<const S*>(p.b.data) + j;
    T* out = static_cast<T*>(p.out) + j;
    with_count<kFewRows>(
        p.M, [&]<int M>() { multiply_few_rows<M>(n, p.K, a, b, p.b.stride, out, p.N, p.accumulate, part); });
  }
}

// The part of [0, n), cut in units, that one of `parts` equal shares is.
inline Range share(int64_t n, int64_t unit, int64_t part, int64_t parts) {
  const int64_t units = ceil_div(n, unit);
  return {minimum(n, units * part / parts * unit), minimum(n, units * (part + 1) / parts * unit)};
}

template <class T, class S>
void multiply(const Product& p, int64_t part, int64_t parts, void* workspace) {
  constexpr int width = kColumns * Vec<T>::size;
  if (p.M <= kFewRows) {
    multiply_stripes<T, S>(p, share(p.N, width, part, parts), workspace);
  } else if (p.M <= kRowsAtMost && p.a_k_stride == 1) {
    multiply_columns<T, S>(p, share(p.N, width, part, parts), workspace);
  } else {
    multiply_rows<T, S>(p, share(p.M, kRowStep, part, parts), workspace);
  }
}

// Either gradient may be left out: null.
template <class T, class S>
void weight_gradients(const WeightGradients& p, int64_t part, int64_t parts, void* workspace) {
  const int64_t B = p.batch, R = p.gate_rows;
  if (p.grad_operand)
    multiply<T, S>({B, p.size, R, p.grad_gates, R, 1, p.weight, p.grad_operand, p.accumulate}, part, parts,
                   workspace);
  if (p.grad_weight)
    multiply<T, T>({R, p.size, B, p.grad_gates, 1, R, p.operand, p.grad_weight, false}, part, parts,
                   workspace);
}

template <class T>
void sum_rows(const RowSum& p, int64_t part, int64_t parts) {
  constexpr int w = Vec<T>::size;
  const Range columns = share(p.N, w, part, parts);
  for (int64_t j = columns.begin; j < columns.end; j += w) {
    const int64_t n = minimum(w, p.N - j);
    const T* from = static_cast<const T*>(p.a) + j;
    Vec<T> total(T(0));
    for (int64_t m0 = 0; m0 < p.M; m0 += kBlockK) {
      Vec<T> block(T(0));
      for (int64_t m = m0; m < minimum(p.M, m0 + kBlockK); ++m)
        block = block + Vec<T>::load(from + m * p.N, n);
      total = total + block;
    }
    total.store(static_cast<T*>(p.out) + j, n);
  }
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
