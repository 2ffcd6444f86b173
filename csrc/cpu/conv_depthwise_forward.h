// The depthwise convolution alone: strips of rows of a few channel blocks, bias and activation on the way
// out.
#pragma once

#include "cpu/conv_statistics.h"
#include "cpu/conv_strip.h"

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

template <class T>
size_t depthwise_workspace(const DepthwiseForward& p, int threads) {
  const DepthwiseShape& s = p.shape;
  const int64_t rows = depthwise_rows_per_strip(s);
  const int64_t taps = blocks_of<T>(s.channels) * s.kernel_h * s.kernel_w * Vec<T>::size;
  return Arena::bytes<T>(taps) + Arena::bytes<T>(padded_channels(s.channels)) +
         threads * (RowRing<T>::bytes(s, rows, kGroup) + Taps<T>::bytes(s) +
                    Arena::bytes<T>(rows * s.out_width * Vec<T>::size));
}

template <class T, class S, class O>
void depthwise_strips_forward(const DepthwiseForward& p, const T* weights, const T* bias, Arena shared,
                              const Parallel& parallel) {
  constexpr int w = Vec<T>::size;
  const DepthwiseShape& s = p.shape;
  const DepthwiseTasks<T> tasks(s);
  const Pixels<S> in(p.input, s.channels / s.multiplier, s.height * s.width);
  const Pixels<O> out(p.output, s.channels, s.out_height * s.out_width), none({nullptr, false}, 0, 0);
  const Pixels<S> grad({const_cast<void*>(p.grad_output), true}, s.channels, out.area);
  const int64_t taps_per_block = s.kernel_h * s.kernel_w * w;
  const int64_t thread_bytes = RowRing<T>::bytes(s, tasks.rows, kGroup) + Taps<T>::bytes(s) +
                               Arena::bytes<T>(tasks.rows * s.out_width * w);
  const bool worth_it = s.batch * out.area * s.channels * s.kernel_h * s.kernel_w > kSerialFlops;
  parallel(tasks.total, worth_it, [&](int64_t begin, int64_t end, int thread) {
    Arena arena{shared.next + thread * thread_bytes};
    RowRing<T> ring(s, tasks.rows, kGroup, arena);
    Taps<T> taps(s, arena);
    T* block = arena.take<T>(tasks.rows * s.out_width * w);
    ring.clear();
    int64_t last_group = -1;
    for (int64_t i = begin; i < end; ++i) {
      const auto t = tasks.at(s, i);
      if (t.group != last_group) ring.image = -1;
      last_group = t.group;
      ring.need(s, t.n, t.row, t.rows, [&](int64_t y0, int64_t y1) {
        load_rows(ring, in, s.multiplier, s.channels, t.n, t.first_block, t.blocks, y0, y1);
      });
      const int64_t pixel = t.row * s.out_width, pixels = t.rows * s.out_width;
      for (int64_t b = 0; b < t.blocks; ++b) {
        const int64_t c = (t.first_block + b) * w;
        depthwise_rows(s, ring, taps, b, t.row, t.rows, weights + c / w * taps_per_block,
                       Vec<T>::load(bias + c), block);
        if (p.statistics) {
          if constexpr (sizeof(S) < sizeof(T)) settle<1, S>(block, pixels, static_cast<const T*>(nullptr));
          strip_statistics<1>(block, pixels, static_cast<T*>(p.statistics) + c, t.n * tasks.strips + t.strip,
                              padded_channels(s.channels), static_cast<const T*>(nullptr));
        }
        with_activation(p.activation, [&]<Activation A>() {
          write_block<1>(block, out, none, t.n, pixel, pixels, c,
                         [&](Vec<T> x, int, int64_t j) __attribute__((always_inline)) {
                           if (!grad.data) return activate<A>(x);
                           return derivative<A>(x) * Vec<T>::load(grad.at(t.n, pixel + j, c), s.channels - c);
                         });
        });
      }
    }
  });
}

template <class T, class S>
void depthwise_forward(const DepthwiseForward& p, const Parallel& parallel) {
  const DepthwiseShape& s = p.shape;
  Arena arena{static_cast<char*>(p.workspace)};
  T* weights = arena.take<T>(blocks_of<T>(s.channels) * s.kernel_h * s.kernel_w * Vec<T>::size);
  T* bias = arena.take<T>(padded_channels(s.channels));
  pack_depthwise(s.channels, s.kernel_h * s.kernel_w, false, static_cast<const S*>(p.weight), weights);
  pack_vector(s.channels, static_cast<const S*>(p.bias), bias);
  if (p.grad_output)
    depthwise_strips_forward<T, S, T>(p, weights, bias, arena, parallel);
  else
    depthwise_strips_forward<T, S, S>(p, weights, bias, arena, parallel);
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
