// The forward of LSTM and GRU cells.
//
//   gates[B, G H] = input[B, I] weight_ih^T + hx[B, H] weight_hh^T + biases, then rnn/gates.h
//
// Work is cut into blocks of w hidden units (w = vector width) and of rows. A block gathers all its gates for
// those units in a buffer [rows, 4 w] that stays in the first-level cache, and the pointwise half runs on it
// at once: gates never reach memory unless the backward wants them. Slots of the buffer: LSTM i, f, g, o;
// GRU r, z, x_n, h_n: the products of a GRU share two slots and part at the third gate.
//
// Two ways to the products, with equal results up to rounding:
//   rows    weights as they lie, dot products along K in chunks that stay in the first-level cache
//   panels  weights packed as [K][gates, w], a block of K at a time, outer products; for larger batches
//
// Bytes: each weight once per block of rows; flops: 2 B G H (I + H).
#pragma once

#include "core/cpu/gemm.h"
#include "core/cpu/integer.h"
#include "core/cpu/transpose.h"
#include "core/cpu/vec_math.h"
#include "rnn/cpu/params.h"
#include "rnn/gates.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kRowsAtMost = 96;
constexpr int64_t kRowBlockBytes = 192 << 10;  // operands of a block of rows: part of a second-level cache
constexpr int64_t kSerialWork = 64 << 10;      // products below which threads cost more than they save
constexpr int64_t kChunk = 4096;               // bytes of a weight row at a time
constexpr int64_t kPanelRows = 16;             // of a batch that takes panels

// Slot of the buffer that the last gate of a product adds to; the others come in order.
template <Cell cell>
constexpr int last_slot(bool hidden) {
  return cell == Cell::lstm || hidden ? 3 : 2;
}

template <class T>
int64_t rows_per_block(const CellWeights& p, int64_t batch) {
  const int64_t fit = kRowBlockBytes / (sizeof(T) * (p.input_size + p.hidden_size));
  return minimum(batch, fit < 12 ? 12 : minimum(fit, kRowsAtMost));
}

template <class T>
constexpr size_t forward_workspace_bytes() {
  constexpr int w = Vec<T>::size;
  return (2 * kRowsAtMost + kBlockK) * 4 * w * sizeof(T);  // gates, accumulators, a panel
}

constexpr bool kProducts[] = {false, true};  // of the input, of the hidden state

// A state tensor in its own dtype: S, or float where the state is wide.
template <class T, class S>
struct State {
  void* data;
  bool wide;
  FUSEDNN_INLINE Vec<T> load(int64_t i, int64_t n) const {
    return wide ? Vec<T>::load(static_cast<const T*>(data) + i, n)
                : Vec<T>::load(static_cast<const S*>(data) + i, n);
  }
  FUSEDNN_INLINE void store(int64_t i, int64_t n, Vec<T> x) const {
    if (wide)
      x.store(static_cast<T*>(data) + i, n);
    else
      x.store(static_cast<S*>(data) + i, n);
  }
};

template <int M, int R, class T, class S>
void dot_tile(int64_t K, const T* a, int64_t a_stride, const S* w, int64_t w_stride, T* partial, int last) {
  constexpr int width = Vec<T>::size;
  Vec<T> acc[M][R];
  const auto at = [&](int m, int r) { return partial + (m * 4 + (r < R - 1 ? r : last)) * width; };
  set_zero(acc);
  dot_accumulate<M, R>(acc, K, a, a_stride, w, w_stride);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) (Vec<T>::load(at(m, r)) + acc[m][r]).store(at(m, r));
}

// partial[rows][4] vectors += products of `rows` rows with the R weight rows of one unit.
template <int R, class T, class S>
void dot_tiles(int64_t rows, int64_t K, const T* a, int64_t a_stride, const S* w, int64_t w_stride,
               T* partial, int last) {
  constexpr int M = kAccumulators / R;
  constexpr int step = 4 * Vec<T>::size;
  int64_t m = 0;
  for (; m + M <= rows; m += M)
    dot_tile<M, R>(K, a + m * a_stride, a_stride, w, w_stride, partial + m * step, last);
  with_count<M - 1>(rows - m, [&]<int N>() {
    dot_tile<N, R>(K, a + m * a_stride, a_stride, w, w_stride, partial + m * step, last);
  });
}

template <Cell cell, class T, class S>
void products_by_rows(const CellForward& p, int64_t row, int64_t rows, int64_t unit, int64_t units, T* buffer,
                      T* partial) {
  constexpr int G = gates_of(cell);
  constexpr int w = Vec<T>::size;
  const CellWeights& q = p.weights;
  for (int64_t u = 0; u < units; ++u) {
    std::memset(partial, 0, rows * 4 * w * sizeof(T));
    for (const bool hidden : kProducts) {
      const Rows& a = hidden ? p.hx : p.input;
      const Rows& weight = hidden ? q.weight_hh : q.weight_ih;
      const int64_t K = hidden ? q.hidden_size : q.input_size;
      const T* x = static_cast<const T*>(a.data) + row * a.stride;
      const S* first = static_cast<const S*>(weight.data) + (unit + u) * weight.stride;
      constexpr int64_t chunk = kChunk / sizeof(T);
      for (int64_t k = 0; k < K; k += chunk)
        dot_tiles<G>(rows, minimum(chunk, K - k), x + k, a.stride, first + k, q.hidden_size * weight.stride,
                     partial, last_slot<cell>(hidden));
    }
    for (int64_t m = 0; m < rows; ++m)
      for (int s = 0; s < 4; ++s) buffer[(m * 4 + s) * w + u] = sum(Vec<T>::load(partial + (m * 4 + s) * w));
  }
}

// panel[k][slot][u] = weights[slot H + first + u][k], zeros beyond the last unit.
template <int G, class T, class S>
void pack_units(int64_t K, int64_t first, int64_t H, const S* weights, int64_t stride, S* panel) {
  constexpr int w = Vec<T>::size;
  int64_t k = 0;
  if (first + w <= H) {
    for (int slot = 0; slot < G; ++slot)  // w streams at a time: more than that are not prefetched
      for (k = 0; k + w <= K; k += w) {
        const S* from = weights + (slot * H + first) * stride + k;
        for (int u = 0; u < w; ++u)
          __builtin_prefetch(from + u * stride + kBlockK, 0, 2);  // of the next panel
        transpose<T>(from, stride, panel + (k * G + slot) * w, G * w);
      }
  }
  for (; k < K; ++k)
    for (int slot = 0; slot < G; ++slot)
      for (int u = 0; u < w; ++u)
        panel[(k * G + slot) * w + u] = first + u < H ? weights[(slot * H + first + u) * stride + k] : S{};
}

// The panels of one unit block, each packed into `panel` when its turn comes: it stays in the first-level cache.
template <Cell cell, class T, class S>
void products_by_panels(const CellForward& p, int64_t row, int64_t rows, int64_t unit, T* buffer, S* panel) {
  constexpr int G = gates_of(cell);
  constexpr int w = Vec<T>::size;
  const CellWeights& q = p.weights;
  std::memset(buffer, 0, rows * 4 * w * sizeof(T));
  for (const bool hidden : kProducts) {
    const Rows& a = hidden ? p.hx : p.input;
    const Rows& weight = hidden ? q.weight_hh : q.weight_ih;
    const int64_t K = hidden ? q.hidden_size : q.input_size;
    const Strided<T> x{static_cast<const T*>(a.data) + row * a.stride, a.stride, 1};
    for (int64_t k = 0; k < K; k += kBlockK) {
      const int64_t depth = minimum(kBlockK, K - k);
      pack_units<G, T>(depth, unit, q.hidden_size, static_cast<const S*>(weight.data) + k, weight.stride,
                       panel);
      tiles<G>(rows, depth, x.at(0, k), panel, G * w, buffer, 4 * w, last_slot<cell>(hidden), Into::add);
    }
  }
}

// The pointwise half of one unit block.
template <class T, class S>
struct Block {
  const CellForward& p;
  int64_t unit, units;  // units <= w
  State<T, S> state, h, c;

  Block(const CellForward& forward, int64_t first, int64_t count)
      : p(forward),
        unit(first),
        units(count),
        state{const_cast<void*>(forward.state.data), forward.wide_state},
        h{forward.h, forward.wide_state},
        c{forward.c, forward.wide_state} {}

  FUSEDNN_INLINE Vec<T> bias(const void* bias, int gate) const {
    return load_or_zero<T>(static_cast<const S*>(bias), gate * p.weights.hidden_size + unit, units);
  }
  FUSEDNN_INLINE Vec<T> both_biases(int gate) const {
    return bias(p.weights.bias_ih, gate) + bias(p.weights.bias_hh, gate);
  }
  FUSEDNN_INLINE Vec<T> previous(int64_t row) const { return state.load(row * p.state.stride + unit, units); }
  FUSEDNN_INLINE void save(int64_t row, int gate, Vec<T> x) const {
    const int64_t H = p.weights.hidden_size;
    x.store(static_cast<S*>(p.gates) + (row * 4 + gate) * H + unit, units);
  }
};

template <class T, class S>
void lstm_pointwise(const Block<T, S>& b, int64_t row, int64_t rows, const T* buffer) {
  using V = Vec<T>;
  constexpr int w = V::size;
  const int64_t H = b.p.weights.hidden_size;
  const V bias[4] = {b.both_biases(0), b.both_biases(1), b.both_biases(2), b.both_biases(3)};
  for (int64_t m = row; m < row + rows; ++m, buffer += 4 * w) {
    const auto gate = [&](int g) { return V::load(buffer + g * w) + bias[g]; };
    const auto s = math::lstm_forward(gate(0), gate(1), gate(2), gate(3), b.previous(m));
    b.c.store(m * H + b.unit, b.units, s.c);
    b.h.store(m * H + b.unit, b.units, s.h);
    if (!b.p.gates) continue;
    b.save(m, 0, s.i);
    b.save(m, 1, s.f);
    b.save(m, 2, s.g);
    b.save(m, 3, s.o);
  }
}

template <class T, class S>
void gru_pointwise(const Block<T, S>& b, int64_t row, int64_t rows, const T* buffer) {
  using V = Vec<T>;
  constexpr int w = V::size;
  const int64_t H = b.p.weights.hidden_size;
  const V bias[4] = {b.both_biases(0), b.both_biases(1), b.bias(b.p.weights.bias_ih, 2),
                     b.bias(b.p.weights.bias_hh, 2)};
  for (int64_t m = row; m < row + rows; ++m, buffer += 4 * w) {
    const auto slot = [&](int g) { return V::load(buffer + g * w) + bias[g]; };
    const V h_n = slot(3);
    const auto s = math::gru_forward(slot(0), slot(1), slot(2), h_n, b.previous(m));
    b.h.store(m * H + b.unit, b.units, s.h);
    if (!b.p.gates) continue;
    b.save(m, 0, s.r);
    b.save(m, 1, s.z);
    b.save(m, 2, s.n);
    b.save(m, 3, h_n);
  }
}

template <Cell cell, class T, class S>
void cell_forward(const CellForward& p, const Parallel& parallel) {
  constexpr int w = Vec<T>::size;
  const CellWeights& q = p.weights;
  const int64_t H = q.hidden_size;
  const int64_t row_step = rows_per_block<T>(q, p.batch);
  const int64_t row_blocks = ceil_div(p.batch, row_step);
  const int64_t work = p.batch * 4 * H * (q.input_size + H);
  parallel(ceil_div(H, w) * row_blocks, work > kSerialWork, [&](int64_t begin, int64_t end, int thread) {
    T* buffer = reinterpret_cast<T*>(static_cast<char*>(p.workspace) + thread * forward_workspace_bytes<T>());
    T* partial = buffer + kRowsAtMost * 4 * w;
    S* panel = reinterpret_cast<S*>(partial + kRowsAtMost * 4 * w);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t unit = task / row_blocks * w, row = task % row_blocks * row_step;
      const int64_t units = minimum(w, H - unit), rows = minimum(row_step, p.batch - row);
      if (p.batch >= kPanelRows)
        products_by_panels<cell, T, S>(p, row, rows, unit, buffer, panel);
      else
        products_by_rows<cell, T, S>(p, row, rows, unit, units, buffer, partial);
      const Block<T, S> block(p, unit, units);
      if constexpr (cell == Cell::lstm)
        lstm_pointwise(block, row, rows, buffer);
      else
        gru_pointwise(block, row, rows, buffer);
    }
  });
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
