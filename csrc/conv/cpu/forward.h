// Forward of the depthwise-separable block and of the depthwise convolution alone.
//
//   out = act2(act1(depthwise(in)) W^T + b2) + residual
//
// Fused: a strip of output rows x all C channels of the depthwise result goes to a per-thread buffer that
// stays in the second-level cache, and all O columns of the product are taken from it before the next strip;
// the depthwise result is computed once and never leaves the core. Bytes: the input, the output, the
// residual. Unfused, for images too small to give every thread strips: depthwise by channel blocks into a
// shared buffer, then the product by (strip, panel of columns).
#pragma once

#include "conv/cpu/depthwise_forward.h"
#include "conv/cpu/product.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kStripBytes = 256 << 10;  // of the depthwise result: part of a second-level cache
constexpr int64_t kStripPixelsAtMost = 192;
constexpr int64_t kStripPixelsAtLeast = 24;  // two tiles

// pack_separable's layout, and the input from which the packed depthwise convolution is made.
template <class T, class S>
struct PackedSeparable {
  DepthwiseSource<T, S> depthwise;
  T *panels, *bias;

  PackedSeparable(const DepthwiseShape& s, Image input, int64_t out_channels, Carver& packed)
      : depthwise(s, input, packed),
        panels(packed.take<T>(Panels<T>::size(out_channels, s.channels))),
        bias(packed.take<T>(blocks_of<T>(out_channels) * Vec<T>::size)) {}
};

template <class T, class S>
void pack_separable(const DepthwiseShape& s, int64_t out_channels, const void* depthwise,
                    const void* depthwise_bias, const void* pointwise, const void* pointwise_bias, void* base,
                    const Parallel& parallel) {
  Carver carver(base);
  const PackedSeparable<T, S> packed(s, {}, out_channels, carver);
  packed.depthwise.pack(depthwise, depthwise_bias);
  pack_panels(out_channels, s.channels, static_cast<const S*>(pointwise), s.channels, 1, packed.panels,
              parallel);
  pack_vector(out_channels, static_cast<const S*>(pointwise_bias), packed.bias);
}

// What a thread works with: fused, all of a strip's depthwise result; else a ring for whole images of a block.
template <class T>
struct SeparableBuffers {
  static constexpr int w = Vec<T>::size;
  RowRing<T> ring;
  Taps<T> taps;
  T *strip, *block;

  SeparableBuffers(const DepthwiseShape& s, int64_t rows, bool fused, Carver& own)
      : ring(s, fused ? rows : s.out_height, fused ? blocks_of<T>(s.channels) : 1, own),
        taps(s, own),
        strip(own.take<T>(fused ? blocks_of<T>(s.channels) * strip_pitch(rows * s.out_width) * w : 0)),
        block(own.take<T>(rows * s.out_width * kPanel * w)) {}
};

inline int64_t rows_per_strip(const DepthwiseShape& s, int64_t bytes_per_pixel, int threads) {
  const int64_t pixels =
      maximum(kStripPixelsAtLeast, minimum(kStripPixelsAtMost, kStripBytes / bytes_per_pixel));
  const int64_t most = maximum(1, minimum(s.out_height, pixels / s.out_width));
  const int64_t least = minimum(most, ceil_div(kStripPixelsAtLeast, s.out_width));
  int64_t best = most;
  double best_cost = 1e30;
  for (int64_t rows = most; rows >= least; --rows) {
    const int64_t strips = ceil_div(s.out_height, rows);
    const double cost = imbalance(s.batch * strips, threads) * (strips * rows) / s.out_height;
    if (cost < best_cost * 0.98) {
      best_cost = cost;
      best = rows;
    }
  }
  return best;
}

template <class T>
ConvPlan separable_plan(const DepthwiseShape& s, int64_t out_channels, bool residual, int64_t item,
                        int threads) {
  constexpr int w = Vec<T>::size;
  ConvPlan plan{};
  const int64_t blocks = blocks_of<T>(s.channels), out_area = s.out_height * s.out_width;
  plan.rows = rows_per_strip(s, blocks * sizeof(Vec<T>), threads);
  const int64_t strips = ceil_div(s.out_height, plan.rows);
  plan.bytes =
      item * s.batch *
      (s.channels / s.multiplier * s.height * s.width + (residual ? 2 : 1) * out_channels * out_area);
  plan.bytes_unfused = plan.bytes + 2 * static_cast<int64_t>(sizeof(T)) * s.batch * s.channels * out_area;
  const double fused_cost = imbalance(s.batch * strips, threads) * (strips * plan.rows) / s.out_height;
  plan.fused = threads == 1 || fused_cost < 1.12;
  plan.strips = s.batch * (plan.fused ? strips : blocks);
  plan.tiles = plan.fused ? 0 : s.batch * strips * ceil_div(out_channels, kPanel * w);
  Carver thread(nullptr), shared(nullptr);
  SeparableBuffers<T>(s, plan.rows, plan.fused, thread);
  shared.take<T>(plan.fused ? 0 : s.batch * blocks * strip_pitch(out_area) * w);
  plan.thread_bytes = thread.bytes;
  plan.shared_bytes = shared.bytes;
  return plan;
}

// Activation over vectors in place.
template <class T>
void activate_all(Activation activation, T* x, int64_t count) {
  if (activation == Activation::none) return;
  with_activation(activation, [&]<Activation A>() {
    for (int64_t i = 0; i < count * Vec<T>::size; i += Vec<T>::size)
      activate<A>(Vec<T>::load(x + i)).store(x + i);
  });
}

template <class T, class S>
struct Separable {
  static constexpr int w = Vec<T>::size;
  const SeparableForward& p;
  const DepthwiseShape& s;
  Carver weights;
  PackedSeparable<T, S> packed;
  Pixels<S> residual, out;
  Panels<T> panels;
  int64_t blocks, strips;

  explicit Separable(const SeparableForward& forward)
      : p(forward),
        s(forward.shape),
        weights(const_cast<void*>(p.packed)),
        packed(s, p.input, p.out_channels, weights),
        residual(p.residual, p.out_channels, s.out_height * s.out_width),
        out(p.output, p.out_channels, s.out_height * s.out_width),
        panels{p.out_channels, blocks_of<T>(s.channels), packed.panels},
        blocks(blocks_of<T>(s.channels)),
        strips(ceil_div(s.out_height, p.plan.rows)) {}

  // `count` blocks of the depthwise result from `first` on, rows [r, r + rows), each at `pitch` from the last.
  void depthwise(RowRing<T>& ring, Taps<T>& taps, int64_t n, int64_t first, int64_t count, int64_t r,
                 int64_t rows, T* strip, int64_t pitch) const {
    packed.depthwise.bring_in(ring, n, first, count, r, rows);
    for (int64_t b = 0; b < count; ++b, strip += pitch) {
      packed.depthwise.make(ring, taps, b, first + b, r, rows, strip);
      activate_all(p.depthwise_activation, strip, rows * s.out_width);
    }
  }

  void product(int64_t n, int64_t first_pixel, int64_t pixels, const T* strip, int64_t pitch, int64_t panel,
               T* block, PrefetchPair& ahead) const {
    panels.with_panel(panel, [&]<int V>(int64_t column, const T* b) {
      ahead.out = lines_of(out, n, first_pixel, pixels, column, minimum(V * w, p.out_channels - column));
      product_panel<V>(pixels, blocks, strip, pitch, b, block, ahead);
      Vec<T> bias[V];
      for (int v = 0; v < V; ++v) bias[v] = Vec<T>::load(packed.bias + column + v * w);
      with_activation(p.pointwise_activation, [&]<Activation A>() {
        write_block<V>(block, out, residual, n, first_pixel, pixels, column,
                       [&](Vec<T> x, int v, int64_t)
                           __attribute__((always_inline)) { return activate<A>(x + bias[v]); });
      });
    });
  }

  SeparableBuffers<T> buffers(int thread) const {
    Carver own(static_cast<char*>(p.workspace) + thread * p.plan.thread_bytes);
    return {s, p.plan.rows, p.plan.fused, own};
  }

  void fused(int64_t begin, int64_t end, int thread) const {
    const int64_t pitch = strip_pitch(p.plan.rows * s.out_width) * w;
    auto [ring, taps, strip, block] = buffers(thread);
    ring.clear();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / strips, r = task % strips * p.plan.rows;
      const int64_t rows = minimum(p.plan.rows, s.out_height - r);
      depthwise(ring, taps, n, 0, blocks, r, rows, strip, pitch);
      PrefetchPair ahead;
      if (task + 1 < end)
        prefetch_input(s, packed.depthwise.in, ring, (task + 1) / strips, (task + 1) % strips * p.plan.rows,
                       p.plan.rows, ceil_div(rows * s.out_width, kTilePixels) * panels.count(), ahead);
      for (int64_t i = 0; i < panels.count(); ++i)
        product(n, r * s.out_width, rows * s.out_width, strip, pitch, i, block, ahead);
    }
  }

  void depthwise_blocks(int64_t begin, int64_t end, int thread, T* shared) const {
    const int64_t pitch = strip_pitch(s.out_height * s.out_width) * w;
    auto [ring, taps, strip, block] = buffers(thread);
    ring.clear();
    for (int64_t task = begin; task < end; ++task) {
      ring.image = -1;
      depthwise(ring, taps, task / blocks, task % blocks, 1, 0, s.out_height, shared + task * pitch, pitch);
    }
  }

  void product_tiles(int64_t begin, int64_t end, int thread, const T* shared) const {
    const int64_t pitch = strip_pitch(s.out_height * s.out_width) * w;
    T* block = buffers(thread).block;
    for (int64_t task = begin; task < end; ++task) {
      PrefetchPair ahead;
      const int64_t i = task / (s.batch * strips), strip = task % (s.batch * strips);
      const int64_t n = strip / strips, r = strip % strips * p.plan.rows;
      const int64_t rows = minimum(p.plan.rows, s.out_height - r);
      product(n, r * s.out_width, rows * s.out_width, shared + n * blocks * pitch + r * s.out_width * w,
              pitch, i, block, ahead);
    }
  }
};

template <class T, class S>
void separable_forward(const SeparableForward& p, const Parallel& parallel) {
  const Separable<T, S> kernel(p);
  const DepthwiseShape& s = p.shape;
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  const bool worth_it = pixels * s.channels * (p.out_channels + s.kernel_h * s.kernel_w) > kSerialFlops;
  if (p.plan.fused) {
    parallel(p.plan.strips, worth_it,
             [&](int64_t begin, int64_t end, int thread) { kernel.fused(begin, end, thread); });
    return;
  }
  T* shared = reinterpret_cast<T*>(static_cast<char*>(p.workspace) + parallel.threads * p.plan.thread_bytes);
  parallel(p.plan.strips, worth_it, [&](int64_t begin, int64_t end, int thread) {
    kernel.depthwise_blocks(begin, end, thread, shared);
  });
  parallel(p.plan.tiles, worth_it,
           [&](int64_t begin, int64_t end, int thread) { kernel.product_tiles(begin, end, thread, shared); });
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
