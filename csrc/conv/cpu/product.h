// The pointwise product on blocks of channels.
//
//   out[P, O] = a[P, K] b[K, O]      a by blocks [K / w][P][w]
//                                    b packed in panels of 2 w columns, [O / 2w][K][2w]
//
// A tile holds M pixels by 2 w columns in registers. The elements of a that it broadcasts lie at fixed
// distances from one pointer, thanks to the blocks. kBlockK rows of a panel stay in the first-level cache
// while all pixels of the strip go past them; sums of such blocks are added up, so rounding errors grow with
// kBlockK, not with K.
#pragma once

#include "conv/cpu/depthwise.h"
#include "core/cpu/gemm.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int kPanel = 2;  // vectors in a panel
constexpr int kTilePixels = kAccumulators / kPanel;

// Lines of memory that will be wanted soon, asked for a few at a time between tiles: [rows][row_bytes], rows
// `stride` bytes apart.
struct Prefetch {
  const char* row = nullptr;
  int64_t stride = 0, row_bytes = 0, rows = 0;
  int64_t at = 0;  // bytes of the row asked for

  FUSEDNN_INLINE int64_t lines() const { return rows * ceil_div(row_bytes, 64); }
  FUSEDNN_INLINE void some(int64_t count) {
    for (; count > 0 && rows > 0; --count) {
      __builtin_prefetch(row + at);
      at += 64;
      if (at < row_bytes) continue;
      at = 0;
      row += stride;
      --rows;
    }
  }
};

template <class S>
Prefetch lines_of(const Pixels<S>& image, int64_t n, int64_t first, int64_t pixels, int64_t channel,
                  int64_t channels) {
  const char* base = reinterpret_cast<const char*>(image.at(n, first, channel));
  constexpr int64_t item = sizeof(S);
  if (!image.channels_last) return {base, image.area * item, pixels * item, channels};
  if (channels == image.channels) return {base, 0, pixels * channels * item, 1};
  return {base, image.channels * item, channels * item, pixels};
}

// What to ask for while a panel is computed: the places it goes to, and the next strip's input.
struct PrefetchPair {
  Prefetch out, in;
  int64_t in_lines = 0;  // per tile
};

// The input rows that output rows [r, r + rows) of image n will bring into the ring, spread over `tiles` tiles.
template <class T, class S>
void prefetch_input(const DepthwiseShape& s, const Pixels<S>& in, const RowRing<T>& ring, int64_t n,
                    int64_t r, int64_t rows, int64_t tiles, PrefetchPair& ahead) {
  const int64_t top = r * s.stride_h - s.pad_top;
  const int64_t bottom = top + (rows - 1) * s.stride_h + extent(s.kernel_h, s.dilation_h);
  const int64_t begin = maximum(maximum(0, top), n == ring.image ? ring.next : 0);
  const int64_t end = minimum(s.height, bottom);
  if (begin >= end) return;
  ahead.in = lines_of(in, n, begin * s.width, (end - begin) * s.width, 0, in.channels);
  ahead.in_lines = ceil_div(ahead.in.lines(), tiles);
}

template <int M, int V, class T>
void product_tile(int64_t blocks, const T* a, int64_t a_block, const T* b, T* c, bool accumulate) {
  constexpr int w = Vec<T>::size;
  Vec<T> acc[M][V];
  set_zero(acc);
  for (int64_t k = 0; k < blocks; ++k, a += a_block) {
#pragma GCC unroll 4
    for (int i = 0; i < w; ++i, b += V * w) {
      Vec<T> bs[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) bs[v] = Vec<T>::load(b + v * w);
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const Vec<T> x(a[m * w + i]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[m][v] = acc[m][v] + x * bs[v];
      }
    }
  }
  store_tile(acc, c, V * w, accumulate);
}

// c[P][V w] = a b for one panel; tiles of nearly equal height.
template <int V, class T>
void product_panel(int64_t pixels, int64_t blocks, const T* a, int64_t a_block, const T* b, T* c,
                   PrefetchPair& ahead) {
  constexpr int w = Vec<T>::size;
  constexpr int64_t step = kBlockK / w;
  const int64_t all_tiles = ceil_div(pixels, kTilePixels);
  const int64_t out_lines = ceil_div(ahead.out.lines(), all_tiles * ceil_div(blocks, step));
  for (int64_t k = 0; k < blocks; k += step) {
    const int64_t depth = minimum(step, blocks - k);
    int64_t tiles = all_tiles;
    Prefetch next{reinterpret_cast<const char*>(b + (k + depth) * V * w * w), 0,
                  depth * V * w * w * int64_t{sizeof(T)}, 1};
    const int64_t next_lines = ceil_div(next.lines(), all_tiles);
    for (int64_t p = 0; p < pixels; --tiles) {
      const int64_t rows = ceil_div(pixels - p, tiles);
      ahead.out.some(out_lines);
      ahead.in.some(ahead.in_lines);
      next.some(next_lines);
      with_count<kTilePixels>(rows, [&]<int M>() {
        product_tile<M, V>(depth, a + k * a_block + p * w, a_block, b + k * V * w * w, c + p * V * w, k > 0);
      });
      p += rows;
    }
  }
}

// The panels of b: `columns` in all, the last one vector wide where that is enough.
template <class T>
struct Panels {
  static constexpr int w = Vec<T>::size;
  int64_t columns, blocks;  // blocks of K
  const T* data;

  FUSEDNN_INLINE int64_t count() const { return ceil_div(columns, kPanel * w); }
  FUSEDNN_INLINE const T* panel(int64_t i) const { return data + i * blocks * w * kPanel * w; }
  static int64_t size(int64_t columns, int64_t K) { return ceil_div(K, w) * w * ceil_div(columns, w) * w; }
  // f<V>(first column, data) for panel i.
  template <class F>
  FUSEDNN_INLINE void with_panel(int64_t i, const F& f) const {
    if (columns - i * kPanel * w > w)
      f.template operator()<kPanel>(i * kPanel * w, panel(i));
    else
      f.template operator()<1>(i * kPanel * w, panel(i));
  }
};

// b[k][j] = weight[j * column_stride + k * k_stride] into panels, zeros beyond K and the last column; one of
// the strides is 1.
template <class T, class S>
void pack_panels(int64_t columns, int64_t K, const S* weight, int64_t column_stride, int64_t k_stride,
                 T* packed, const Parallel& parallel) {
  constexpr int w = Vec<T>::size;
  const int64_t depth = ceil_div(K, w) * w;
  parallel(ceil_div(columns, kPanel * w), columns * K > 16384, [&](int64_t begin, int64_t end, int) {
    for (int64_t first = begin * kPanel * w; first < minimum(columns, end * kPanel * w);
         first += kPanel * w) {
      const int64_t width = columns - first > w ? kPanel * w : w;
      T* panel = packed + first * depth;
      std::memset(panel, 0, depth * width * sizeof(T));
      for (int64_t j = 0; j < width; j += w)
        load_columns(weight + (first + j) * column_stride, column_stride, k_stride,
                     minimum(w, columns - first - j), K, panel + j, width);
    }
  });
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
