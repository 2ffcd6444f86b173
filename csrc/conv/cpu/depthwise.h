// Depthwise convolution on blocks of channels.
//
//   out[r, x, c] = bias[c] + sum over i, j of in[r s - p + i d, x s - p + j d, c] weight[i, j, c]
//
// A ring of input rows, zero-padded at both ends, holds what a strip of output rows needs: [row][C / w][x][w].
// Successive strips of an image share its rows, so each input row is brought in once per thread; layouts, dtypes
// and borders are settled there, and the inner loop has no branch. Up to kPixels outputs of a row stand in
// registers: per tap, one weight vector and kPixels products whose other operand comes from the first-level
// cache.
#pragma once

#include "conv/cpu/blocks.h"
#include "core/cpu/carver.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int kPixels = 8;

template <class T>
constexpr int64_t blocks_of(int64_t channels) {
  return ceil_div(channels, Vec<T>::size);
}

inline int64_t extent(int64_t kernel, int64_t dilation) { return (kernel - 1) * dilation + 1; }

// Rows are numbered as in the source, pixels of a row from `first_x` on; a spread source has zeros between them.
template <class T>
struct RowRing {
  static constexpr int w = Vec<T>::size;
  int64_t height, source_width, spread_h, spread_w;
  int64_t slots, blocks, first_x, width;
  T *data, *zeros;
  int64_t image = -1, next = 0;  // rows of `image` below `next` were brought in

  RowRing(const DepthwiseShape& s, int64_t rows, int64_t blocks_, Carver& own)
      : height(s.height), source_width(s.width), spread_h(s.spread_h), spread_w(s.spread_w), blocks(blocks_) {
    const int64_t reach = (rows - 1) * s.stride_h + extent(s.kernel_h, s.dilation_h);
    slots = minimum(height, ceil_div(reach, spread_h));
    first_x = -s.pad_left;
    width = (s.out_width - 1) * s.stride_w + extent(s.kernel_w, s.dilation_w);
    data = own.take<T>(slots * blocks * width * w);
    zeros = own.take<T>(width * w);
  }

  // Columns [begin, end) of the source that lie within the ring's rows.
  FUSEDNN_INLINE int64_t begin_x() const { return first_x <= 0 ? 0 : ceil_div(first_x, spread_w); }
  FUSEDNN_INLINE int64_t end_x() const {
    const int64_t end = first_x + width;
    return end <= 0 ? 0 : minimum(source_width, ceil_div(end, spread_w));
  }
  FUSEDNN_INLINE T* row(int64_t y, int64_t block) const {
    return data + ((y % slots) * blocks + block) * width * w;
  }
  FUSEDNN_INLINE int64_t offset(int64_t x) const { return (x * spread_w - first_x) * w; }
  // The row at y of the spread source, or zeros.
  FUSEDNN_INLINE const T* spread_row(int64_t y, int64_t block) const {
    return is_zero(y) ? zeros : row(spread_h == 1 ? y : y / spread_h, block);
  }
  FUSEDNN_INLINE bool is_zero(int64_t y) const {
    return y < 0 || y >= (height - 1) * spread_h + 1 || (spread_h > 1 && y % spread_h != 0);
  }

  void clear() {
    std::memset(zeros, 0, width * w * sizeof(T));
    const int64_t begin = begin_x(), end = end_x();
    const int64_t left = begin < end ? offset(begin) : width * w;
    const int64_t right = begin < end ? offset(end - 1) + w : width * w;
    for (int64_t i = 0; i < slots * blocks; ++i) {
      T* r = data + i * width * w;
      if (spread_w > 1) {
        std::memset(r, 0, width * w * sizeof(T));
        continue;
      }
      std::memset(r, 0, left * sizeof(T));
      std::memset(r + right, 0, (width * w - right) * sizeof(T));
    }
    image = -1;
  }

  // Brings in the source rows that `rows` output rows from `first` on need, by load(first_y, last_y).
  template <class F>
  FUSEDNN_INLINE void need(const DepthwiseShape& s, int64_t n, int64_t first, int64_t rows, const F& load) {
    const int64_t top = first * s.stride_h - s.pad_top;
    const int64_t bottom = top + (rows - 1) * s.stride_h + extent(s.kernel_h, s.dilation_h);
    int64_t begin = top <= 0 ? 0 : ceil_div(top, spread_h);
    const int64_t end = bottom <= 0 ? 0 : minimum(height, ceil_div(bottom, spread_h));
    if (n == image) begin = maximum(begin, next);
    if (begin < end) load(begin, end);
    next = n == image ? maximum(next, end) : end;
    image = n;
  }
};

// Source rows [y0, y1) of image n, `blocks` channel blocks from `first_block` on, into the ring.
template <class T, class S>
void load_rows(const RowRing<T>& ring, const Pixels<S>& in, int64_t multiplier, int64_t channels, int64_t n,
               int64_t first_block, int64_t blocks, int64_t y0, int64_t y1) {
  constexpr int w = Vec<T>::size;
  const int64_t W = ring.source_width, x0 = ring.begin_x(), x1 = ring.end_x();
  if (multiplier > 1) {
    for (int64_t y = y0; y < y1; ++y) {
      for (int64_t b = 0; b < blocks; ++b) {
        for (int64_t x = x0; x < x1; ++x) {
          for (int64_t c = 0; c < w; ++c) {
            const int64_t channel = (first_block + b) * w + c;
            T* to = ring.row(y, b) + ring.offset(x) + c;
            *to = channel < channels ? widen(*in.at(n, y * W + x, channel / multiplier)) : T(0);
          }
        }
      }
    }
    return;
  }
  if (in.channels_last) {
    for (int64_t y = y0; y < y1; ++y) {
      T* rows = ring.row(y, 0);
      for (int64_t x = x0; x < x1; ++x) {
        const S* from = in.at(n, y * W + x, first_block * w);
        T* to = rows + ring.offset(x);
        int64_t left = channels - first_block * w;
        for (int64_t b = 0; b < blocks; ++b, left -= w)
          Vec<T>::load(from + b * w, left).store(to + b * ring.width * w);
      }
    }
    return;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t channel = (first_block + b) * w;
    const S* planes = in.at(n, y0 * W, channel);
    read_planes<T>(planes, in.area, channels - channel, (y1 - y0) * W,
                   [&](int64_t at, const Vec<T>(&v)[w], int64_t pixels) __attribute__((always_inline)) {
                     int64_t y = y0 + at / W, x = at % W;
                     T* row = ring.row(y, b);
#pragma GCC unroll 16
                     for (int i = 0; i < w; ++i) {
                       if (i >= pixels) break;
                       if (x >= x0 && x < x1) v[i].store(row + ring.offset(x));
                       if (++x == W && i + 1 < pixels) {
                         x = 0;
                         row = ring.row(++y, b);
                       }
                     }
                   });
  }
}

// Rows under one output row and the weights that meet them.
template <class T>
struct Taps {
  const T** rows;
  const T** weights;
  int64_t count;                     // rows of the kernel that meet the image
  int64_t kernel_w, step, dilation;  // elements between outputs, and between taps

  Taps(const DepthwiseShape& s, Carver& own)
      : rows(own.take<const T*>(s.kernel_h)),
        weights(own.take<const T*>(s.kernel_h)),
        count(0),
        kernel_w(s.kernel_w),
        step(s.stride_w * Vec<T>::size),
        dilation(s.dilation_w * Vec<T>::size) {}

  // With `all`, rows outside the image are zeros; without, they are left out.
  FUSEDNN_INLINE void collect(const DepthwiseShape& s, const RowRing<T>& ring, int64_t block, int64_t r,
                              const T* first_weight, bool all) {
    count = 0;
    for (int64_t i = 0; i < s.kernel_h; ++i) {
      const int64_t y = r * s.stride_h - s.pad_top + i * s.dilation_h;
      if (!all && ring.is_zero(y)) continue;
      rows[count] = ring.spread_row(y, block);
      weights[count++] = first_weight + i * kernel_w * Vec<T>::size;
    }
  }
};

// out[X][w] for X neighbours; K > 0: a K x K kernel, undilated, `step` from output to output in vectors.
template <int X, int K, int step, class T>
void depthwise_tile(const Taps<T>& taps, int64_t offset, Vec<T> bias, T* out) {
  constexpr int w = Vec<T>::size;
  Vec<T> acc[X];
#pragma GCC unroll 8
  for (int x = 0; x < X; ++x) acc[x] = bias;
  if constexpr (K > 0) {
#pragma GCC unroll 5
    for (int i = 0; i < K; ++i) {
      const T* row = taps.rows[i] + offset;
#pragma GCC unroll 5
      for (int j = 0; j < K; ++j) {
        const Vec<T> weight = Vec<T>::load(taps.weights[0] + (i * K + j) * w);
#pragma GCC unroll 8
        for (int x = 0; x < X; ++x) acc[x] = acc[x] + Vec<T>::load(row + (x * step + j) * w) * weight;
      }
    }
  } else {
    for (int64_t i = 0; i < taps.count; ++i) {
      const T* row = taps.rows[i] + offset;
      const T* weights = taps.weights[i];
      for (int64_t j = 0; j < taps.kernel_w; ++j, row += taps.dilation, weights += w) {
        const Vec<T> weight = Vec<T>::load(weights);
#pragma GCC unroll 8
        for (int x = 0; x < X; ++x)
          acc[x] = acc[x] + Vec<T>::load(row + x * (step ? step * w : taps.step)) * weight;
      }
    }
  }
#pragma GCC unroll 8
  for (int x = 0; x < X; ++x) acc[x].store(out + x * w);
}

// One output row, cut into tiles of nearly equal width.
template <int K, int step, class T>
void depthwise_row(const Taps<T>& taps, int64_t out_width, Vec<T> bias, T* out) {
  constexpr int w = Vec<T>::size;
  int64_t tiles = ceil_div(out_width, kPixels);
  for (int64_t x = 0; x < out_width; --tiles) {
    const int64_t pixels = ceil_div(out_width - x, tiles);
    const int64_t offset = x * (step ? step * w : taps.step);
    with_count<kPixels>(pixels,
                        [&]<int X>() { depthwise_tile<X, K, step>(taps, offset, bias, out + x * w); });
    x += pixels;
  }
}

// Output rows [r, r + rows) of one block of channels, from the ring: out [rows W'][w].
template <class T>
void depthwise_rows(const DepthwiseShape& s, const RowRing<T>& ring, Taps<T>& taps, int64_t block, int64_t r,
                    int64_t rows, const T* weights, Vec<T> bias, T* out) {
  const bool square = s.kernel_h == s.kernel_w && s.dilation_w == 1 && s.spread_h == 1;
  const int64_t kernel = square && s.stride_w <= 2 ? s.kernel_w : 0;
  const bool fixed = kernel == 3 || kernel == 5;
  for (int64_t end = r + rows; r < end; ++r, out += s.out_width * Vec<T>::size) {
    taps.collect(s, ring, block, r, weights, fixed);
    if (kernel == 3 && s.stride_w == 1)
      depthwise_row<3, 1>(taps, s.out_width, bias, out);
    else if (kernel == 3)
      depthwise_row<3, 2>(taps, s.out_width, bias, out);
    else if (kernel == 5 && s.stride_w == 1)
      depthwise_row<5, 1>(taps, s.out_width, bias, out);
    else if (kernel == 5)
      depthwise_row<5, 2>(taps, s.out_width, bias, out);
    else if (s.stride_w == 1)
      depthwise_row<0, 1>(taps, s.out_width, bias, out);
    else
      depthwise_row<0, 0>(taps, s.out_width, bias, out);
  }
}

// Weights [C][taps] as [C / w][taps][w], zeros beyond C; `flip` turns each kernel by half.
template <class T, class S>
void pack_depthwise(int64_t channels, int64_t taps, bool flip, const S* weight, T* packed) {
  constexpr int w = Vec<T>::size;
  for (int64_t b = 0; b < blocks_of<T>(channels); ++b)
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = b * w; c < (b + 1) * w; ++c)
        *packed++ = c < channels ? T(widen(weight[c * taps + (flip ? taps - 1 - t : t)])) : T(0);
}

template <class T, class S>
void pack_vector(int64_t channels, const S* from, T* packed) {
  for (int64_t c = 0; c < blocks_of<T>(channels) * Vec<T>::size; ++c)
    packed[c] = from && c < channels ? T(widen(from[c])) : T(0);
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
