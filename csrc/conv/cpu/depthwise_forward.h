// The depthwise convolution alone: strips of rows of a few channel blocks, bias and activation on the way
// out. In training it is made again wherever its result is wanted: nine products a value cost less than the
// value's way to memory and back.
#pragma once

#include "conv/cpu/statistics.h"
#include "conv/cpu/strip.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kGroup = 4;  // channel blocks in a task
constexpr int64_t kDepthwisePixels = 192;

// Strips of an image, and of all images; a matter of the shape alone, as sums are kept by strip.
inline int64_t depthwise_rows_per_strip(const DepthwiseShape& s) {
  const int64_t rows = maximum(1, minimum(s.out_height, kDepthwisePixels / maximum(1, s.out_width)));
  return ceil_div(s.out_height, ceil_div(s.out_height, rows));
}

inline int64_t depthwise_strips(const DepthwiseShape& s, int64_t* counts) {
  const int64_t rows = depthwise_rows_per_strip(s), strips = ceil_div(s.out_height, rows);
  for (int64_t i = 0; counts && i < s.batch * strips; ++i)
    counts[i] = minimum(rows, s.out_height - i % strips * rows) * s.out_width;
  return s.batch * strips;
}

// Tasks of one image in order: channel groups, then strips, so that strips share the ring's rows.
template <class T>
struct DepthwiseTasks {
  int64_t rows, strips, groups, blocks, total;

  explicit DepthwiseTasks(const DepthwiseShape& s)
      : rows(depthwise_rows_per_strip(s)),
        strips(ceil_div(s.out_height, rows)),
        groups(ceil_div(blocks_of<T>(s.channels), kGroup)),
        blocks(blocks_of<T>(s.channels)),
        total(s.batch * groups * strips) {}

  struct Task {
    int64_t n, group, strip, first_block, blocks, row, rows;
  };
  Task at(const DepthwiseShape& s, int64_t i) const {
    const int64_t strip = i % strips, group = i / strips % groups, row = strip * rows;
    return {i / strips / groups,
            group,
            strip,
            group * kGroup,
            minimum(kGroup, blocks - group * kGroup),
            row,
            minimum(rows, s.out_height - row)};
  }
};

// The depthwise result in the precision that the image has, made of the input wherever it is wanted.
template <class T, class S>
struct DepthwiseSource {
  static constexpr int w = Vec<T>::size;
  const DepthwiseShape& s;
  Pixels<S> in;
  int64_t blocks, taps_per_block;
  T *weights, *bias;

  DepthwiseSource(const DepthwiseShape& shape, Image input, Arena& arena)
      : s(shape),
        in(input, s.channels / s.multiplier, s.height * s.width),
        blocks(blocks_of<T>(s.channels)),
        taps_per_block(s.kernel_h * s.kernel_w * w),
        weights(arena.take<T>(blocks * taps_per_block)),
        bias(arena.take<T>(blocks * w)) {}
  static int64_t bytes(const DepthwiseShape& s) {
    const int64_t channels = blocks_of<T>(s.channels) * w;
    return Arena::bytes<T>(channels * s.kernel_h * s.kernel_w) + Arena::bytes<T>(channels);
  }
  void pack(const void* weight, const void* from_bias) const {
    pack_depthwise(s.channels, s.kernel_h * s.kernel_w, false, static_cast<const S*>(weight), weights);
    pack_vector(s.channels, static_cast<const S*>(from_bias), bias);
  }

  void bring_in(RowRing<T>& ring, int64_t n, int64_t first_block, int64_t count, int64_t r,
                int64_t rows) const {
    ring.need(s, n, r, rows, [&](int64_t y0, int64_t y1) {
      load_rows(ring, in, s.multiplier, s.channels, n, first_block, count, y0, y1);
    });
  }
  // Rows [r, r + rows) of the ring's block `b`, which is block `block` of the image.
  void make(const RowRing<T>& ring, Taps<T>& taps, int64_t b, int64_t block, int64_t r, int64_t rows,
            T* out) const {
    depthwise_rows(s, ring, taps, b, r, rows, weights + block * taps_per_block,
                   Vec<T>::load(bias + block * w), out);
  }
  void make_kept(const RowRing<T>& ring, Taps<T>& taps, int64_t b, int64_t block, int64_t r, int64_t rows,
                 T* out) const {
    make(ring, taps, b, block, r, rows, out);
    if constexpr (sizeof(S) < sizeof(T))
      settle<1, S>(out, rows * s.out_width, static_cast<const T*>(nullptr));
  }
  // All channels of a strip, block after block `pitch` elements apart.
  void make_strip(RowRing<T>& ring, Taps<T>& taps, int64_t n, int64_t r, int64_t rows, T* strip,
                  int64_t pitch) const {
    bring_in(ring, n, 0, blocks, r, rows);
    for (int64_t b = 0; b < blocks; ++b) make_kept(ring, taps, b, b, r, rows, strip + b * pitch);
  }
};

template <class T>
int64_t depthwise_thread_bytes(const DepthwiseShape& s) {
  const int64_t rows = depthwise_rows_per_strip(s);
  return RowRing<T>::bytes(s, rows, kGroup) + Taps<T>::bytes(s) +
         Arena::bytes<T>(rows * s.out_width * Vec<T>::size);
}

template <class T, class S>
size_t depthwise_workspace(const DepthwiseForward& p, int threads) {
  return DepthwiseSource<T, S>::bytes(p.shape) + threads * depthwise_thread_bytes<T>(p.shape);
}

template <class T, class S>
void depthwise_forward(const DepthwiseForward& p, const Parallel& parallel) {
  constexpr int w = Vec<T>::size;
  const DepthwiseShape& s = p.shape;
  Arena shared{static_cast<char*>(p.workspace)};
  const DepthwiseSource<T, S> source(s, p.input, shared);
  source.pack(p.weight, p.bias);
  const DepthwiseTasks<T> tasks(s);
  const Pixels<S> out(p.output, s.channels, s.out_height * s.out_width), none({nullptr, false}, 0, 0);
  const bool worth_it = s.batch * out.area * s.channels * s.kernel_h * s.kernel_w > kSerialFlops;
  parallel(tasks.total, worth_it, [&](int64_t begin, int64_t end, int thread) {
    Arena arena{shared.next + thread * depthwise_thread_bytes<T>(s)};
    RowRing<T> ring(s, tasks.rows, kGroup, arena);
    Taps<T> taps(s, arena);
    T* block = arena.take<T>(tasks.rows * s.out_width * w);
    ring.clear();
    int64_t last_group = -1;
    for (int64_t i = begin; i < end; ++i) {
      const auto t = tasks.at(s, i);
      if (t.group != last_group) ring.image = -1;
      last_group = t.group;
      source.bring_in(ring, t.n, t.first_block, t.blocks, t.row, t.rows);
      const int64_t pixel = t.row * s.out_width, pixels = t.rows * s.out_width;
      for (int64_t b = 0; b < t.blocks; ++b) {
        const int64_t c = (t.first_block + b) * w;
        if (p.statistics) {
          source.make_kept(ring, taps, b, t.first_block + b, t.row, t.rows, block);
          strip_statistics<1>(block, pixels, static_cast<T*>(p.statistics) + c, t.n * tasks.strips + t.strip,
                              padded_channels(s.channels), static_cast<const T*>(nullptr));
        } else {
          source.make(ring, taps, b, t.first_block + b, t.row, t.rows, block);
        }
        if (!out.data) continue;
        with_activation(p.activation, [&]<Activation A>() {
          write_block<1>(block, out, none, t.n, pixel, pixels, c,
                         [](Vec<T> x, int, int64_t)
                             __attribute__((always_inline)) { return activate<A>(x); });
        });
      }
    }
  });
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
