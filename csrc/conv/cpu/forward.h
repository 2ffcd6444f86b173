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

#include "conv/cpu/product.h"
#include "conv/cpu/strip.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kStripBytes = 256 << 10;  // of the depthwise result: part of a second-level cache
constexpr int64_t kStripPixelsAtMost = 192;
constexpr int64_t kStripPixelsAtLeast = 24;  // two tiles

// pack_separable's layout.
template <class T>
struct PackedSeparable {
  static constexpr int w = Vec<T>::size;
  T *depthwise, *depthwise_bias, *panels, *pointwise_bias;
  int64_t bytes;

  PackedSeparable(const DepthwiseShape& s, int64_t out_channels, void* base) {
    Arena arena{static_cast<char*>(base)};
    depthwise = arena.take<T>(blocks_of<T>(s.channels) * s.kernel_h * s.kernel_w * w);
    depthwise_bias = arena.take<T>(blocks_of<T>(s.channels) * w);
    panels = arena.take<T>(Panels<T>::size(out_channels, s.channels));
    pointwise_bias = arena.take<T>(blocks_of<T>(out_channels) * w);
    bytes = arena.next - static_cast<char*>(base);
  }
};

template <class T, class S>
void pack_separable(const DepthwiseShape& s, int64_t out_channels, const S* depthwise,
                    const S* depthwise_bias, const S* pointwise, const S* pointwise_bias, void* base,
                    const Parallel& parallel) {
  const PackedSeparable<T> packed(s, out_channels, base);
  pack_depthwise(s.channels, s.kernel_h * s.kernel_w, false, depthwise, packed.depthwise);
  pack_vector(s.channels, depthwise_bias, packed.depthwise_bias);
  pack_panels(out_channels, s.channels, pointwise, s.channels, 1, packed.panels, parallel);
  pack_vector(out_channels, pointwise_bias, packed.pointwise_bias);
}

template <class T>
int64_t separable_thread_bytes(const DepthwiseShape& s, int64_t rows, bool fused) {
  constexpr int w = Vec<T>::size;
  const int64_t blocks = fused ? blocks_of<T>(s.channels) : 1, pixels = rows * s.out_width;
  return RowRing<T>::bytes(s, fused ? rows : s.out_height, blocks) + Taps<T>::bytes(s) +
         (fused ? Arena::bytes<T>(blocks * strip_pitch(pixels) * w) : 0) +
         Arena::bytes<T>(pixels * kPanel * w);
}

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
  plan.thread_bytes = separable_thread_bytes<T>(s, plan.rows, plan.fused);
  plan.shared_bytes = plan.fused ? 0 : Arena::bytes<T>(s.batch * blocks * strip_pitch(out_area) * w);
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
  PackedSeparable<T> packed;
  Pixels<S> in, residual, out;
  Panels<T> panels;
  int64_t blocks, strips;

  explicit Separable(const SeparableForward& forward)
      : p(forward),
        s(forward.shape),
        packed(s, p.out_channels, const_cast<void*>(p.packed)),
        in(p.input, s.channels / s.multiplier, s.height * s.width),
        residual(p.residual, p.out_channels, s.out_height * s.out_width),
        out(p.output, p.out_channels, s.out_height * s.out_width),
        panels{p.out_channels, blocks_of<T>(s.channels), packed.panels},
        blocks(blocks_of<T>(s.channels)),
        strips(ceil_div(s.out_height, p.plan.rows)) {}

  // `count` blocks of the depthwise result from `first` on, rows [r, r + rows), each at `pitch` from the
  // last.
  void depthwise(RowRing<T>& ring, Taps<T>& taps, int64_t n, int64_t first, int64_t count, int64_t r,
                 int64_t rows, T* strip, int64_t pitch) const {
    ring.need(s, n, r, rows, [&](int64_t y0, int64_t y1) {
      load_rows(ring, in, s.multiplier, s.channels, n, first, count, y0, y1);
    });
    for (int64_t b = 0; b < count; ++b, strip += pitch) {
      const T* weights = packed.depthwise + (first + b) * s.kernel_h * s.kernel_w * w;
      depthwise_rows(s, ring, taps, b, r, rows, weights,
                     Vec<T>::load(packed.depthwise_bias + (first + b) * w), strip);
      activate_all(p.depthwise_activation, strip, rows * s.out_width);
    }
  }

  void product(int64_t n, int64_t first_pixel, int64_t pixels, const T* strip, int64_t pitch, int64_t panel,
               T* block, PrefetchPair& ahead) const {
    panels.with_panel(panel, [&]<int V>(int64_t column, const T* b) {
      ahead.out = lines_of(out, n, first_pixel, pixels, column, minimum(V * w, p.out_channels - column));
      product_panel<V>(pixels, blocks, strip, pitch, b, block, ahead);
      Vec<T> bias[V];
      for (int v = 0; v < V; ++v) bias[v] = Vec<T>::load(packed.pointwise_bias + column + v * w);
      with_activation(p.pointwise_activation, [&]<Activation A>() {
        write_block<V>(block, out, residual, n, first_pixel, pixels, column,
                       [&](Vec<T> x, int v, int64_t)
                           __attribute__((always_inline)) { return activate<A>(x + bias[v]); });
      });
    });
  }

  void fused(int64_t begin, int64_t end, Arena arena) const {
    const int64_t pitch = strip_pitch(p.plan.rows * s.out_width) * w;
    RowRing<T> ring(s, p.plan.rows, blocks, arena);
    Taps<T> taps(s, arena);
    T* strip = arena.take<T>(blocks * pitch);
    T* block = arena.take<T>(p.plan.rows * s.out_width * kPanel * w);
    ring.clear();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / strips, r = task % strips * p.plan.rows;
      const int64_t rows = minimum(p.plan.rows, s.out_height - r);
      depthwise(ring, taps, n, 0, blocks, r, rows, strip, pitch);
      PrefetchPair ahead;
      if (task + 1 < end)
        look_ahead(s, in, ring, (task + 1) / strips, (task + 1) % strips * p.plan.rows, p.plan.rows,
                   ceil_div(rows * s.out_width, kTilePixels) * panels.count(), ahead);
      for (int64_t i = 0; i < panels.count(); ++i)
        product(n, r * s.out_width, rows * s.out_width, strip, pitch, i, block, ahead);
    }
  }

  void depthwise_blocks(int64_t begin, int64_t end, Arena arena, T* shared) const {
    const int64_t pitch = strip_pitch(s.out_height * s.out_width) * w;
    RowRing<T> ring(s, s.out_height, 1, arena);
    Taps<T> taps(s, arena);
    ring.clear();
    for (int64_t task = begin; task < end; ++task) {
      ring.image = -1;
      depthwise(ring, taps, task / blocks, task % blocks, 1, 0, s.out_height, shared + task * pitch, pitch);
    }
  }

  void product_tiles(int64_t begin, int64_t end, Arena arena, const T* shared) const {
    const int64_t pitch = strip_pitch(s.out_height * s.out_width) * w;
    T* block = arena.take<T>(p.plan.rows * s.out_width * kPanel * w);
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
  const auto arena = [&](int thread) {
    return Arena{static_cast<char*>(p.workspace) + thread * p.plan.thread_bytes};
  };
  const DepthwiseShape& s = p.shape;
  const int64_t pixels = s.batch * s.out_height * s.out_width;
  const bool worth_it = pixels * s.channels * (p.out_channels + s.kernel_h * s.kernel_w) > kSerialFlops;
  if (p.plan.fused) {
    parallel(p.plan.strips, worth_it,
             [&](int64_t begin, int64_t end, int thread) { kernel.fused(begin, end, arena(thread)); });
    return;
  }
  T* shared = reinterpret_cast<T*>(arena(parallel.threads).next);
  parallel(p.plan.strips, worth_it, [&](int64_t begin, int64_t end, int thread) {
    kernel.depthwise_blocks(begin, end, arena(thread), shared);
  });
  parallel(p.plan.tiles, worth_it, [&](int64_t begin, int64_t end, int thread) {
    kernel.product_tiles(begin, end, arena(thread), shared);
  });
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
