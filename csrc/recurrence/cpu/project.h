// What needs no state: weights times frames, for a chunk of the steps.
//
//   shared      out[frame, r, p] = sum over c of weight[r, c] f[frame, c, p]       scores; G where x is a sum
//   positioned  G[frame, j, p] = sum over c of weight_ih[j, c, p] f[frame, c, p]   G where x is a frame
//
// `positioned` is P small products, one for each position; with vectors along p both operands are read as
// they lie. A tile is kRows rows of the weight times kFrames frames: 24 accumulators of 11 loads (AVX-512),
// of which 3 come from the second-level cache. Both operands are copied to panels, frames once for a strip of
// some vectors of positions (part of the second-level cache), weights once for each vector and group of
// frames (part of the first). A strip's weights lie together in memory, and those of the next rows are asked
// for a strip at a time: a vector alone would leave half of its lines, and all of its pages, to the next one.
// Bytes: weight_ih once a chunk, G written once, in whole cache lines: its rows are padded to vectors.
#pragma once

#include "core/cpu/carver.h"
#include "core/cpu/gemm.h"
#include "recurrence/cpu/params.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kChunkBytes = 40 << 20;  // of products and G at a time
constexpr int64_t kFrameBytes = 1 << 20;   // of frames in panels
constexpr int64_t kLineBytes = 64;
constexpr int kFrames = 3;
constexpr int kRows = kAccumulators / kFrames;
constexpr int64_t kStrip = 4;                  // vectors, at most
constexpr int64_t kSerialProducts = 64 << 10;  // products below which threads cost more than they save

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

// out[frame, R, padded P] for frames [begin, end) of the chunk, by one thread.
template <class T>
void project_shared(const Chunk<T>& chunk, int64_t R, const void* weight, T* out, T* panel, int64_t begin,
                    int64_t end) {
  const int64_t size = R * padded<T>(chunk.q.positions);
  for (int64_t i = begin; i < end; ++i)
    project_frame(chunk.q, R, static_cast<const T*>(weight), chunk.frame(i), panel, out + i * size);
}

// acc[r][n] = sum over c of weights[c][r] frames[c][n], lane by lane: a lane is a position. `ask()` asks for
// a line that is needed later.
template <class T, class Ask>
FUSEDNN_INLINE void positioned_tile(int64_t C, const T* weights, const T* frames,
                                    Vec<T> (&acc)[kRows][kFrames], Ask&& ask) {
  constexpr int w = Vec<T>::size;
  set_zero(acc);
  for (int64_t c = 0; c < C; ++c) {
    ask();
    Vec<T> x[kFrames];
#pragma GCC unroll 4
    for (int n = 0; n < kFrames; ++n) x[n] = Vec<T>::load(frames + n * w);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> row = in_register(Vec<T>::load(weights + r * w));
#pragma GCC unroll 4
      for (int n = 0; n < kFrames; ++n) acc[r][n] = acc[r][n] + row * x[n];
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

// How `positioned` is cut: `strips` strips of `vectors` vectors of positions, and frames in groups.
struct Cut {
  int64_t vectors, strips, group, rows;

  // Frames, of one vector of positions, that fit a thread's panels.
  template <class T>
  static int64_t fit(const AttentionLstm& q) {
    const int64_t bytes = q.channels * Vec<T>::size * static_cast<int64_t>(sizeof(T));
    return maximum(kFrameBytes / bytes / kFrames, 1) * kFrames;
  }
  template <class T>
  static Cut of(const AttentionLstm& q, int64_t frames) {
    const int64_t group = minimum(ceil_div(frames, kFrames) * kFrames, fit<T>(q));
    const int64_t vectors = ceil_div(q.positions, Vec<T>::size);
    const int64_t together = minimum(kStrip, fit<T>(q) / group);
    return {vectors, ceil_div(vectors, together), group, ceil_div(q.gate_rows(), kRows)};
  }
  int64_t first(int64_t strip) const { return strip * vectors / strips; }
};

template <class T>
const T* weight_row(const AttentionLstm& q, int64_t j, int64_t p) {
  return static_cast<const T*>(q.weight_ih) + j * q.channels * q.positions + p;
}

// The weights of rows [j, j + kRows) at the vector of positions from p, [C, kRows, vector].
template <class T>
void pack_weight_panel(const AttentionLstm& q, int64_t j, int64_t p, T* panel) {
  pack_positions<kRows>(
      q.channels, q.positions, minimum(kRows, q.gate_rows() - j), q.positions - p,
      [&](int r) { return weight_row<T>(q, j + r, p); }, panel);
}

// One thread's part of `positioned`.
template <class T>
class Positioned {
 public:
  Positioned(const Chunk<T>& chunk, const Cut& cut, T* out, T* workspace)
      : chunk_(chunk),
        q_(chunk.q),
        cut_(cut),
        out_(out),
        weights_(workspace),
        frames_(weights_ + kRows * q_.channels * w) {}

  // Tiles' rows [begin, end) of G for one strip.
  void run(int64_t strip, int64_t begin, int64_t end) {
    const int64_t p = cut_.first(strip) * w, vectors = cut_.first(strip + 1) - cut_.first(strip);
    for (int64_t first = 0; first < chunk_.frames(); first += cut_.group) {
      const int64_t count = minimum(cut_.group, chunk_.frames() - first);
      for (int64_t v = 0; v < vectors; ++v) pack_frames(p + v * w, first, count, v);
      for (int64_t j = begin * kRows; j < minimum(end * kRows, q_.gate_rows()); j += kRows) {
        Prefetch next(*this, p, vectors, j + kRows, vectors * ceil_div(count, kFrames));
        for (int64_t v = 0; v < vectors; ++v) rows(p + v * w, j, first, count, v, next);
      }
    }
  }

 private:
  static constexpr int w = Vec<T>::size;

  // The lines of the next rows' strip come while these rows are in work, some with each tile: one for a few
  // products, as only so many can be under way.
  struct Prefetch {
    const char *run, *at, *end;
    int64_t pitch, bytes, runs, share, left = 0;

    Prefetch(const Positioned& work, int64_t p, int64_t vectors, int64_t j, int64_t tiles) {
      const AttentionLstm& q = work.q_;
      runs = maximum(minimum(kRows, q.gate_rows() - j), 0) * q.channels;
      run = reinterpret_cast<const char*>(weight_row<T>(q, j, p));
      pitch = q.positions * sizeof(T);
      bytes = minimum(vectors * w, q.positions - p) * sizeof(T);
      at = run;
      end = run + bytes - 1;
      share = ceil_div(runs * (ceil_div(bytes, kLineBytes) + 1), tiles);
    }
    void next_tile() { left = runs > 0 ? share : 0; }
    FUSEDNN_INLINE void ask() {
      if (left == 0) return;
      --left;
      __builtin_prefetch(at, 0, 2);
      if (at < end) {
        at = at + kLineBytes < end ? at + kLineBytes : end;
        return;
      }
      run += pitch;
      at = run;
      end = run + bytes - 1;
      if (--runs == 0) left = 0;
    }
  };

  T* panel(int64_t v) const { return frames_ + v * cut_.group * q_.channels * w; }

  void pack_frames(int64_t p, int64_t first, int64_t count, int64_t v) {
    for (int64_t i = 0; i < count; i += kFrames)
      pack_positions<kFrames>(
          q_.channels, q_.positions, count - i, q_.positions - p,
          [&](int r) { return chunk_.frame(first + i + r) + p; }, panel(v) + i * q_.channels * w);
  }

  void rows(int64_t p, int64_t j, int64_t first, int64_t frames, int64_t v, Prefetch& next) {
    const int64_t C = q_.channels, J = q_.gate_rows(), stride = padded<T>(q_.positions);
    const int64_t count = minimum(kRows, J - j);
    pack_weight_panel(q_, j, p, weights_);
    for (int64_t i = 0; i < frames; i += kFrames) {
      next.next_tile();
      Vec<T> acc[kRows][kFrames];
      positioned_tile(C, weights_, panel(v) + i * C * w, acc, [&] { next.ask(); });
      T* const to = out_ + ((first + i) * J + j) * stride + p;
      if (count == kRows && i + kFrames <= frames)
        store(acc, to, J * stride, stride, kFrames, kRows);
      else
        store(acc, to, J * stride, stride, frames - i, count);
    }
  }

  static FUSEDNN_INLINE void store(const Vec<T> (&acc)[kRows][kFrames], T* to, int64_t frame, int64_t row,
                                   int64_t frames, int64_t rows) {
#pragma GCC unroll 4
    for (int n = 0; n < kFrames; ++n)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        if (n < frames && r < rows) acc[r][n].stream(to + n * frame + r * row);
  }

  const Chunk<T>& chunk_;
  const AttentionLstm& q_;
  const Cut cut_;
  T* out_;
  T *weights_, *frames_;
};

// A thread's part, units [begin, end), of G. Strips differ in length: units are vectors times tiles' rows.
template <class T>
void project_positioned(const Chunk<T>& chunk, const Cut& cut, T* out, T* workspace, int64_t begin,
                        int64_t end) {
  Positioned<T> work(chunk, cut, out, workspace);
  for (int64_t strip = 0; strip < cut.strips; ++strip) {
    const int64_t before = cut.first(strip) * cut.rows, vectors = cut.first(strip + 1) - cut.first(strip);
    const auto row_at = [&](int64_t unit) {
      return minimum(ceil_div(maximum(unit - before, 0), vectors), cut.rows);
    };
    if (row_at(begin) < row_at(end)) work.run(strip, row_at(begin), row_at(end));
  }
  stream_fence();
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
  // Elements that a thread needs: a panel of a frame, or those of Positioned.
  static int64_t thread_elements(const AttentionLstm& q) {
    const int64_t vectors = q.hoisted && q.flatten ? maximum(4, Cut::fit<T>(q) + kRows) : 4;
    return vectors * q.channels * Vec<T>::size;
  }

  Projections(const AttentionLstm& q, Carver& shared) {
    const int64_t row = steps_per_chunk(q) * q.batch * padded<T>(q.positions);
    products = shared.take<T>(row * q.energies);
    gates = shared.take<T>(q.hoisted ? row * q.gate_rows() : 0);
  }

  // One parallel region for both products, which don't need each other.
  void make(const Chunk<T>& chunk, const ThreadParts& threads, const Parallel& parallel) const {
    const AttentionLstm& q = chunk.q;
    const int64_t frames = chunk.frames();
    const bool positioned = q.hoisted && q.flatten;
    const Cut cut = Cut::of<T>(q, frames);
    const int64_t units = positioned ? cut.vectors * cut.rows : frames;
    const bool worth_it = frames * rows(q) * q.channels * q.positions > kSerialProducts;
    parallel(units, worth_it, [&](int64_t begin, int64_t end, int thread) {
      T* const workspace = threads.of(thread).template take<T>(thread_elements(q));
      const int64_t first = begin * frames / units, last = end * frames / units;
      project_shared(chunk, q.energies, q.score_weight, products, workspace, first, last);
      if (positioned)
        project_positioned(chunk, cut, gates, workspace, begin, end);
      else if (q.hoisted)
        project_shared(chunk, q.gate_rows(), q.weight_ih, gates, workspace, first, last);
    });
  }
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
