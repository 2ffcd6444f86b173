// What of a sequence waits for no state: weights times frames, for a chunk of steps.
//
//   shared      out[frame, r, p] = sum over c of weight[r, c] f[frame, c, p]        scores; G where x is a
//   sum positioned  G[frame, j, p] = sum over c of weight_ih[j, c, p] f[frame, c, p]    G where x is a frame
//
// `positioned` is P small products, one for each position; with vectors along p both operands are read as
// they lie. A tile is kRows rows of the weight times kFrames frames: 24 accumulators of 10 loads (AVX-512).
// Both operands are copied to panels, frames once for a block of positions (part of the second-level cache),
// weights once for each block and group of frames (part of the first). Bytes: weight_ih once a chunk, G
// written once, in whole cache lines: its rows are padded to vectors.
#pragma once

#include "cpu/gemm.h"
#include "cpu/integer.h"
#include "fusednn/attention_lstm_cpu.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kChunkBytes = 40 << 20;  // of products and G at a time
constexpr int64_t kFrameBytes = 512 << 10;
constexpr int kFrames = 4;
constexpr int kRows = kAccumulators / kFrames;
constexpr int64_t kRowsPerItem = 16 * kRows;
constexpr int64_t kSerialProducts = 64 << 10;  // products below which threads cost more than they save

// Positions with the padding of a row of G, products or map.
template <class T>
constexpr int64_t padded(int64_t n) {
  return ceil_div(n, Vec<T>::size) * Vec<T>::size;
}

// Steps [first, first + count) of every sequence; frame i is that of sequence i / count.
template <class T>
struct Chunk {
  const AttentionLstm& q;
  int64_t first, count;

  int64_t frames() const { return q.batch * count; }
  const T* frame(int64_t i) const {
    const int64_t index = i / count * q.steps + first + i % count;
    return static_cast<const T*>(q.features) + index * q.channels * q.positions;
  }
};

template <class T>
void single_vectors(int64_t rows, int64_t K, Strided<T> a, const T* b, int64_t b_stride, T* c,
                    int64_t c_stride) {
  int64_t m = 0;
  for (; m + 6 <= rows; m += 6)
    tile<6, 1>(K, a.at(m, 0), b, b_stride, c + m * c_stride, c_stride, 0, Into::overwrite);
  for (; m < rows; ++m)
    tile<1, 1>(K, a.at(m, 0), b, b_stride, c + m * c_stride, c_stride, 0, Into::overwrite);
}

template <class T>
size_t shared_workspace_bytes(const AttentionLstm& q) {
  return q.channels * 4 * Vec<T>::size * sizeof(T);
}

// out[R, padded P] = weight[R, C] f[C, P]; zeros beyond P.
template <class T>
void project_frame(const AttentionLstm& q, int64_t R, const T* weight, const T* f, T* panel, T* out) {
  constexpr int w = Vec<T>::size;
  const int64_t C = q.channels, P = q.positions, stride = padded<T>(P);
  const Strided<T> a{weight, C, 1};
  for (int64_t p = 0; p < P; p += 4 * w) {
    pack_panel(C, P - p, 4 * w, f + p, P, panel);
    if (stride - p >= 4 * w) {
      tiles<4>(R, C, a, panel, 4 * w, out + p, stride, 3, Into::overwrite);
    } else {
      for (int64_t v = 0; p + v < stride; v += w)
        single_vectors(R, C, a, panel + v, 4 * w, out + p + v, stride);
    }
  }
}

// out[frame, R, padded P] for the chunk's frames.
template <class T>
void project_shared(const Chunk<T>& chunk, int64_t R, const void* weight, T* out, char* workspaces,
                    const Parallel& parallel) {
  const AttentionLstm& q = chunk.q;
  const bool worth_it = chunk.frames() * R * q.channels * q.positions > kSerialProducts;
  parallel(chunk.frames(), worth_it, [&](int64_t begin, int64_t end, int thread) {
    T* panel = reinterpret_cast<T*>(workspaces + thread * shared_workspace_bytes<T>(q));
    for (int64_t i = begin; i < end; ++i)
      project_frame(q, R, static_cast<const T*>(weight), chunk.frame(i), panel,
                    out + i * R * padded<T>(q.positions));
  });
}

// acc[r][n] = sum over c of weights[c][r] frames[c][n], lane by lane: a lane is a position.
template <class T>
FUSEDNN_INLINE void positioned_tile(int64_t C, const T* weights, const T* frames,
                                    Vec<T> (&acc)[kRows][kFrames]) {
  constexpr int w = Vec<T>::size;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < kFrames; ++n) acc[r][n] = Vec<T>(T(0));
  for (int64_t c = 0; c < C; ++c) {
    Vec<T> row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = Vec<T>::load(weights + r * w);
#pragma GCC unroll 4
    for (int n = 0; n < kFrames; ++n) {
      const Vec<T> x = Vec<T>::load(frames + n * w);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) acc[r][n] = acc[r][n] + row[r] * x;
    }
    weights += kRows * w;
    frames += kFrames * w;
  }
}

// panel[c][row] = rows[row][c, p .. p + w), zeros beyond `count` rows and n positions.
template <int N, class T, class RowOf>
void pack_positions(int64_t C, int64_t P, int64_t count, int64_t n, const RowOf& row_of, T* panel) {
  constexpr int w = Vec<T>::size;
  for (int r = 0; r < N; ++r) {
    const T* row = r < count ? row_of(r) : nullptr;
    for (int64_t c = 0; c < C; ++c)
      (row ? Vec<T>::load(row + c * P, n) : Vec<T>(T(0))).store(panel + (c * N + r) * w);
  }
}

template <class T>
int64_t frames_per_group(const AttentionLstm& q, int64_t frames) {
  const int64_t fit = kFrameBytes / (q.channels * Vec<T>::size * static_cast<int64_t>(sizeof(T)));
  return minimum(ceil_div(frames, kFrames), maximum(fit / kFrames, 1)) * kFrames;
}

template <class T>
size_t positioned_workspace_bytes(const AttentionLstm& q) {
  return (frames_per_group<T>(q, q.batch * q.steps) + kRows) * q.channels * Vec<T>::size * sizeof(T);
}

// One thread's part of `positioned`.
template <class T>
class Positioned {
 public:
  Positioned(const Chunk<T>& chunk, T* out, void* workspace)
      : chunk_(chunk),
        q_(chunk.q),
        out_(out),
        group_(frames_per_group<T>(q_, chunk.frames())),
        weights_(static_cast<T*>(workspace)),
        frames_(weights_ + kRows * q_.channels * w) {}

  // Rows [begin, end) of G for the positions of one vector.
  void run(int64_t p, int64_t begin, int64_t end) {
    for (int64_t first = 0; first < chunk_.frames(); first += group_) {
      const int64_t count = minimum(group_, chunk_.frames() - first);
      pack_frames(p, first, count);
      for (int64_t j = begin; j < end; j += kRows) rows(p, j, minimum(kRows, end - j), first, count);
    }
  }

 private:
  static constexpr int w = Vec<T>::size;

  void pack_frames(int64_t p, int64_t first, int64_t count) {
    if (p == packed_p_ && first == packed_first_) return;
    packed_p_ = p;
    packed_first_ = first;
    for (int64_t i = 0; i < count; i += kFrames)
      pack_positions<kFrames>(
          q_.channels, q_.positions, count - i, q_.positions - p,
          [&](int r) { return chunk_.frame(first + i + r) + p; }, frames_ + i * q_.channels * w);
  }

  const T* weight_row(int64_t j, int64_t p) const {
    return static_cast<const T*>(q_.weight_ih) + j * q_.channels * q_.positions + p;
  }

  void rows(int64_t p, int64_t j, int64_t count, int64_t first, int64_t frames) {
    const int64_t C = q_.channels, J = q_.gate_rows(), stride = padded<T>(q_.positions);
    pack_positions<kRows>(
        C, q_.positions, count, q_.positions - p, [&](int r) { return weight_row(j + r, p); }, weights_);
    // The lines of the next rows come while these are in work, some with each tile.
    const int64_t ahead = minimum(kRows, J - j - kRows) * C, share = ceil_div(ahead * kFrames, frames);
    const T* next = weight_row(j + kRows, p);
    int64_t asked = 0;
    for (int64_t i = 0; i < frames; i += kFrames) {
      for (const int64_t until = minimum(ahead, asked + share); asked < until; ++asked) {
        __builtin_prefetch(next + asked * q_.positions);
        __builtin_prefetch(next + asked * q_.positions + w - 1);
      }
      Vec<T> acc[kRows][kFrames];
      positioned_tile(C, weights_, frames_ + i * C * w, acc);
#pragma GCC unroll 4
      for (int n = 0; n < kFrames; ++n) {
        T* to = out_ + ((first + i + n) * J + j) * stride + p;
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          if (i + n < frames && r < count) acc[r][n].stream(to + r * stride);
      }
    }
  }

  const Chunk<T>& chunk_;
  const AttentionLstm& q_;
  T* out_;
  int64_t group_;
  T *weights_, *frames_;
  int64_t packed_p_ = -1, packed_first_ = -1;
};

template <class T>
void project_positioned(const Chunk<T>& chunk, T* out, char* workspaces, const Parallel& parallel) {
  const AttentionLstm& q = chunk.q;
  const int64_t J = q.gate_rows(), w = Vec<T>::size, parts = ceil_div(J, kRowsPerItem);
  const bool worth_it = chunk.frames() * J * q.channels * q.positions > kSerialProducts;
  parallel(ceil_div(q.positions, w) * parts, worth_it, [&](int64_t begin, int64_t end, int thread) {
    Positioned<T> work(chunk, out, workspaces + thread * positioned_workspace_bytes<T>(q));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % parts * kRowsPerItem;
      work.run(item / parts * w, first, minimum(first + kRowsPerItem, J));
    }
    stream_fence();
  });
}

// Products of the scores [frame, K, padded P] and, if hoisted, G [frame, J, padded P] of a chunk.
template <class T>
struct Projections {
  T *products, *gates;

  static int64_t rows(const AttentionLstm& q) { return q.energies + (q.hoisted ? q.gate_rows() : 0); }
  static int64_t steps_per_chunk(const AttentionLstm& q) {
    const int64_t bytes = q.batch * rows(q) * padded<T>(q.positions) * static_cast<int64_t>(sizeof(T));
    return minimum(q.steps, maximum(kChunkBytes / bytes, 1));
  }
  static size_t bytes(const AttentionLstm& q) {
    return steps_per_chunk(q) * q.batch * rows(q) * padded<T>(q.positions) * sizeof(T);
  }
  static size_t thread_bytes(const AttentionLstm& q) {
    const size_t shared = shared_workspace_bytes<T>(q);
    if (!q.hoisted || !q.flatten) return shared;
    const size_t positioned = positioned_workspace_bytes<T>(q);
    return shared > positioned ? shared : positioned;
  }

  Projections(const AttentionLstm& q, void* memory)
      : products(static_cast<T*>(memory)),
        gates(products + steps_per_chunk(q) * q.batch * q.energies * padded<T>(q.positions)) {}

  void make(const Chunk<T>& chunk, char* workspaces, const Parallel& parallel) const {
    const AttentionLstm& q = chunk.q;
    project_shared(chunk, q.energies, q.score_weight, products, workspaces, parallel);
    if (!q.hoisted) return;
    if (q.flatten)
      project_positioned(chunk, gates, workspaces, parallel);
    else
      project_shared(chunk, q.gate_rows(), q.weight_ih, gates, workspaces, parallel);
  }
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
