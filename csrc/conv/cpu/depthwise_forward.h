// The depthwise convolution alone: strips of rows of a few channel blocks, bias and activation on the way
// out. In training it is made again wherever its result is wanted: nine products a value cost less than the
// value's way to memory and back.
#pragma once

#include "conv/cpu/statistics.h"
#include "conv/cpu/strip.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kGroup = 4;  // channel blocks in a task
constexpr int64_t kDepthwisePixels = 192;

inline int64_t depthwise_rows_per_strip(const DepthwiseShape& s) {
  return RowStrips(s, kDepthwisePixels).rows;
}

inline int64_t depthwise_strips(const DepthwiseShape& s, int64_t* counts) {
  return count_strips(RowStrips(s, kDepthwisePixels), counts);
}

// Tasks of one image in order: channel groups, then strips, so that strips share the ring's rows.
template <class T>
struct DepthwiseTasks {
  RowStrips strips;
  int64_t blocks, groups, total;

  explicit DepthwiseTasks(const DepthwiseShape& s)
      : strips(s, kDepthwisePixels),
        blocks(blocks_of<T>(s.channels)),
        groups(ceil_div(blocks, kGroup)),
        total(strips.total() * groups) {}

  struct Task : RowStrips::Strip {
    int64_t group, index, first_block, blocks;  // index: of the strip in all images
  };
  Task at(int64_t i) const {
    const int64_t group = i / strips.per_image % groups;
    const int64_t index = i / strips.per_image / groups * strips.per_image + i % strips.per_image;
    return {strips.at(index), group, index, group * kGroup, minimum(kGroup, blocks - group * kGroup)};
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

  DepthwiseSource(const DepthwiseShape& shape, Image input, Carver& shared)
      : s(shape),
        in(input, s.channels / s.multiplier, s.height * s.width),
        blocks(blocks_of<T>(s.channels)),
        taps_per_block(s.kernel_h * s.kernel_w * w),
        weights(shared.take<T>(blocks * taps_per_block)),
        bias(shared.take<T>(blocks * w)) {}
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
  void make_stored(const RowRing<T>& ring, Taps<T>& taps, int64_t b, int64_t block, int64_t r, int64_t rows,
                   T* out) const {
    make(ring, taps, b, block, r, rows, out);
    if constexpr (sizeof(S) < sizeof(T))
      round_to_storage<1, S>(out, rows * s.out_width, static_cast<const T*>(nullptr));
  }
  // All channels of a strip, block after block `pitch` elements apart.
  void make_strip(RowRing<T>& ring, Taps<T>& taps, int64_t n, int64_t r, int64_t rows, T* strip,
                  int64_t pitch) const {
    bring_in(ring, n, 0, blocks, r, rows);
    for (int64_t b = 0; b < blocks; ++b) make_stored(ring, taps, b, b, r, rows, strip + b * pitch);
  }
};

template <class T, class S>
struct DepthwiseForwardPass {
  static constexpr int w = Vec<T>::size;
  const DepthwiseForward& p;
  const DepthwiseShape& s;
  DepthwiseTasks<T> tasks;
  DepthwiseSource<T, S> source;
  ThreadParts threads;

  struct Buffers {
    RowRing<T> ring;
    Taps<T> taps;
    T* block;
    Buffers(const DepthwiseForwardPass& pass, Carver& own)
        : ring(pass.s, pass.tasks.strips.rows, kGroup, own),
          taps(pass.s, own),
          block(own.take<T>(pass.tasks.strips.pixels() * w)) {}
  };

  DepthwiseForwardPass(const DepthwiseForward& forward, int thread_count, Carver& shared)
      : p(forward),
        s(forward.shape),
        tasks(s),
        source(s, p.input, shared),
        threads(thread_count, shared, [&](Carver& own) { Buffers(*this, own); }) {}

  void run(const Parallel& parallel) const {
    source.pack(p.weight, p.bias);
    const bool worth_it =
        s.batch * s.out_height * s.out_width * s.channels * s.kernel_h * s.kernel_w > kSerialFlops;
    parallel(tasks.total, worth_it,
             [&](int64_t begin, int64_t end, int thread) { run_tasks(begin, end, thread); });
  }

  void run_tasks(int64_t begin, int64_t end, int thread) const {
    const Pixels<S> out(p.output, s.channels, s.out_height * s.out_width), none({nullptr, false}, 0, 0);
    Carver own = threads.of(thread);
    auto [ring, taps, block] = Buffers(*this, own);
    ring.clear();
    int64_t last_group = -1;
    for (int64_t i = begin; i < end; ++i) {
      const auto t = tasks.at(i);
      if (t.group != last_group) ring.image = -1;
      last_group = t.group;
      source.bring_in(ring, t.n, t.first_block, t.blocks, t.row, t.rows);
      for (int64_t b = 0; b < t.blocks; ++b) {
        const int64_t c = (t.first_block + b) * w;
        if (p.statistics) {
          source.make_stored(ring, taps, b, t.first_block + b, t.row, t.rows, block);
          strip_statistics<1>(block, t.count, static_cast<T*>(p.statistics) + c, t.index,
                              padded_channels(s.channels), static_cast<const T*>(nullptr));
        } else {
          source.make(ring, taps, b, t.first_block + b, t.row, t.rows, block);
        }
        if (!out.data) continue;
        with_activation(p.activation, [&]<Activation A>() {
          write_block<1>(block, out, none, t.n, t.first, t.count, c,
                         [](Vec<T> x, int, int64_t)
                             __attribute__((always_inline)) { return activate<A>(x); });
        });
      }
    }
  }
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
