// Gradients of a depthwise convolution from dz, that of its result.
//
//   input   the convolution of dz, spread by the stride, with the kernels turned by half
//   weight  dW[i, j, c] = sum over n, r, x of dz[r, x, c] in[r s - p + i d, x s - p + j d, c];  bias: sum of
//   dz
//
// Weight gradients are summed by strip, strips by runs of them, and runs in order: what a run is depends on
// the shape alone, so the result doesn't depend on the number of threads. Behind a norm, dz is made of da and
// z as it is brought in.
#pragma once

#include "cpu/conv_depthwise_forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kRuns = 16;  // of strips, per channel group
constexpr int kTapsAtOnce = 8;

inline DepthwiseShape transposed(const DepthwiseShape& s) {
  DepthwiseShape t = s;
  t.multiplier = 1;
  t.height = s.out_height;
  t.width = s.out_width;
  t.out_height = s.height;
  t.out_width = s.width;
  t.stride_h = t.stride_w = 1;
  t.spread_h = s.stride_h;
  t.spread_w = s.stride_w;
  t.pad_top = extent(s.kernel_h, s.dilation_h) - 1 - s.pad_top;
  t.pad_left = extent(s.kernel_w, s.dilation_w) - 1 - s.pad_left;
  return t;
}

// dz on its way in: as it lies, or from da and z.
template <class T, class S, class G>
struct GradientSource {
  static constexpr int w = Vec<T>::size;
  Pixels<G> grad;
  Pixels<const S> z;
  const void* norm;
  int64_t channels;

  explicit GradientSource(const DepthwiseBackward& p)
      : grad(p.grad, p.shape.channels, p.shape.out_height * p.shape.out_width),
        z({const_cast<void*>(p.z), true}, p.shape.channels, grad.area),
        norm(p.norm),
        channels(p.shape.channels) {}

  void load_rows_into(const RowRing<T>& ring, int64_t n, int64_t first_block, int64_t blocks, int64_t y0,
                      int64_t y1) const {
    if (!norm) return load_rows(ring, grad, 1, channels, n, first_block, blocks, y0, y1);
    const int64_t x0 = ring.begin_x(), x1 = ring.end_x();
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t c = (first_block + b) * w;
      const NormGradient<T> gradient(norm, channels, c);
      for (int64_t y = y0; y < y1; ++y) {
        T* row = ring.row(y, b);
        for (int64_t x = x0; x < x1; ++x) {
          const int64_t pixel = y * ring.source_width + x;
          gradient(Vec<T>::load(grad.at(n, pixel, c), channels - c),
                   Vec<T>::load(z.at(n, pixel, c), channels - c))
              .store(row + ring.offset(x));
        }
      }
    }
  }
  void load(int64_t n, int64_t first, int64_t count, int64_t c, T* block) const {
    load_block(grad, n, first, count, c, block);
    if (!norm) return;
    const NormGradient<T> gradient(norm, channels, c);
    for (int64_t i = 0; i < count; ++i)
      gradient(Vec<T>::load(block + i * w), Vec<T>::load(z.at(n, first + i, c), channels - c))
          .store(block + i * w);
  }
};

// sums[j] += dz * in for `taps` neighbours in a kernel row, over one output row.
template <int taps, class T>
void weight_gradient_row(int64_t width, const T* dz, const T* in, int64_t step, int64_t dilation, T* sums) {
  constexpr int w = Vec<T>::size;
  Vec<T> acc[taps];
#pragma GCC unroll 8
  for (int j = 0; j < taps; ++j) acc[j] = Vec<T>::load(sums + j * w);
  for (int64_t x = 0; x < width; ++x, in += step, dz += w) {
    const Vec<T> g = Vec<T>::load(dz);
#pragma GCC unroll 8
    for (int j = 0; j < taps; ++j) acc[j] = acc[j] + g * Vec<T>::load(in + j * dilation);
  }
#pragma GCC unroll 8
  for (int j = 0; j < taps; ++j) acc[j].store(sums + j * w);
}

// The same for a whole 3 x 3 kernel, and the bias.
template <class T>
void weight_gradient_3x3(int64_t width, const T* dz, const T* const* rows, int64_t step, int64_t dilation,
                         T* sums) {
  constexpr int w = Vec<T>::size;
  Vec<T> acc[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) acc[t] = Vec<T>::load(sums + t * w);
  for (int64_t x = 0; x < width; ++x, dz += w) {
    const Vec<T> g = Vec<T>::load(dz);
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j)
        acc[i * 3 + j] = acc[i * 3 + j] + g * Vec<T>::load(rows[i] + x * step + j * dilation);
  }
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) acc[t].store(sums + t * w);
}

template <class T>
void add_bias_gradient(int64_t pixels, const T* dz, T* sums) {
  constexpr int w = Vec<T>::size;
  Vec<T> acc(T(0));
  for (int64_t i = 0; i < pixels; ++i) acc = acc + Vec<T>::load(dz + i * w);
  (Vec<T>::load(sums) + acc).store(sums);
}

// sums [taps + 1][w] += those of a strip: dz [rows W'][w], the ring's rows of one block.
template <class T>
void weight_gradient_strip(const DepthwiseShape& s, const RowRing<T>& ring, Taps<T>& taps, int64_t block,
                           int64_t r, int64_t rows, const T* dz, T* sums) {
  constexpr int w = Vec<T>::size;
  add_bias_gradient(rows * s.out_width, dz, sums + s.kernel_h * s.kernel_w * w);
  const bool small = s.kernel_h == 3 && s.kernel_w == 3;
  for (int64_t end = r + rows; r < end; ++r, dz += s.out_width * w) {
    taps.collect(s, ring, block, r, sums, small);
    if (small) {
      weight_gradient_3x3(s.out_width, dz, taps.rows, taps.step, taps.dilation, sums);
      continue;
    }
    for (int64_t i = 0; i < taps.count; ++i) {
      T* to = const_cast<T*>(taps.weights[i]);
      const T* in = taps.rows[i];
      for (int64_t j = 0; j < s.kernel_w; j += kTapsAtOnce) {
        switch (minimum(kTapsAtOnce, s.kernel_w - j)) {
#define FUSEDNN_CASE(N)                                                                                    \
  case N:                                                                                                  \
    weight_gradient_row<N>(s.out_width, dz, in + j * taps.dilation, taps.step, taps.dilation, to + j * w); \
    break;
          FUSEDNN_CASE(1)
          FUSEDNN_CASE(2)
          FUSEDNN_CASE(3)
          FUSEDNN_CASE(4)
          FUSEDNN_CASE(5)
          FUSEDNN_CASE(6)
          FUSEDNN_CASE(7)
          FUSEDNN_CASE(8)
#undef FUSEDNN_CASE
          default:
            break;
        }
      }
    }
  }
}

template <class T>
struct WeightGradientRuns {
  DepthwiseTasks<T> tasks;
  int64_t image_strips, runs, run_length, sums;  // elements of a run's sums for one block

  explicit WeightGradientRuns(const DepthwiseShape& s)
      : tasks(s), image_strips(s.batch * tasks.strips), sums((s.kernel_h * s.kernel_w + 1) * Vec<T>::size) {
    run_length = ceil_div(image_strips, minimum(image_strips, kRuns));
    runs = ceil_div(image_strips, run_length);
  }
  int64_t thread_bytes(const DepthwiseShape& s) const {
    return RowRing<T>::bytes(s, tasks.rows, kGroup) + Taps<T>::bytes(s) +
           Arena::bytes<T>(tasks.rows * s.out_width * Vec<T>::size);
  }
};

template <class T, class S, class G>
void depthwise_weight_gradient(const DepthwiseBackward& p, Arena arena, const Parallel& parallel) {
  constexpr int w = Vec<T>::size;
  const DepthwiseShape& s = p.shape;
  const WeightGradientRuns<T> q(s);
  const Pixels<S> in(p.input, s.channels / s.multiplier, s.height * s.width);
  const GradientSource<T, S, G> source(p);
  const int64_t blocks = q.tasks.blocks, taps_in_all = s.kernel_h * s.kernel_w;
  T* partial = arena.take<T>(q.runs * blocks * q.sums);
  const bool worth_it = s.batch * s.out_height * s.out_width * s.channels * taps_in_all > kSerialFlops;
  parallel(q.tasks.groups * q.runs, worth_it, [&](int64_t begin, int64_t end, int thread) {
    Arena mine{arena.next + thread * q.thread_bytes(s)};
    RowRing<T> ring(s, q.tasks.rows, kGroup, mine);
    Taps<T> taps(s, mine);
    T* dz = mine.take<T>(q.tasks.rows * s.out_width * w);
    ring.clear();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / q.runs, run = task % q.runs;
      const int64_t first_block = group * kGroup, count = minimum(kGroup, blocks - first_block);
      T* sums = partial + (run * blocks + first_block) * q.sums;
      std::memset(sums, 0, count * q.sums * sizeof(T));
      ring.image = -1;
      const int64_t last = minimum(q.image_strips, (run + 1) * q.run_length);
      for (int64_t strip = run * q.run_length; strip < last; ++strip) {
        const int64_t n = strip / q.tasks.strips, r = strip % q.tasks.strips * q.tasks.rows;
        const int64_t rows = minimum(q.tasks.rows, s.out_height - r);
        ring.need(s, n, r, rows, [&](int64_t y0, int64_t y1) {
          load_rows(ring, in, s.multiplier, s.channels, n, first_block, count, y0, y1);
        });
        for (int64_t b = 0; b < count; ++b) {
          source.load(n, r * s.out_width, rows * s.out_width, (first_block + b) * w, dz);
          weight_gradient_strip(s, ring, taps, b, r, rows, dz, sums + b * q.sums);
        }
      }
    }
  });
  T *weight = static_cast<T*>(p.grad_weight), *bias = static_cast<T*>(p.grad_bias);
  parallel(blocks, q.runs * blocks * q.sums > 65536, [&](int64_t begin, int64_t end, int) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t t = 0; t <= taps_in_all; ++t) {
        Vec<T> total(T(0));
        for (int64_t run = 0; run < q.runs; ++run)
          total = total + Vec<T>::load(partial + (run * blocks + b) * q.sums + t * w);
        T lanes[w];
        total.store(lanes);
        for (int64_t c = b * w; c < minimum(s.channels, (b + 1) * w); ++c) {
          if (t < taps_in_all)
            weight[c * taps_in_all + t] = lanes[c - b * w];
          else if (bias)
            bias[c] = lanes[c - b * w];
        }
      }
    }
  });
}

template <class T, class S, class G>
void depthwise_input_gradient(const DepthwiseBackward& p, Arena arena, const Parallel& parallel) {
  constexpr int w = Vec<T>::size;
  const DepthwiseShape s = transposed(p.shape);
  const DepthwiseTasks<T> tasks(s);
  const GradientSource<T, S, G> source(p);
  const Pixels<S> out(p.grad_input, s.channels, s.out_height * s.out_width), none({nullptr, false}, 0, 0);
  const int64_t taps_per_block = s.kernel_h * s.kernel_w * w;
  T* weights = arena.take<T>(tasks.blocks * taps_per_block);
  pack_depthwise(s.channels, s.kernel_h * s.kernel_w, true, static_cast<const S*>(p.weight), weights);
  const int64_t thread_bytes = RowRing<T>::bytes(s, tasks.rows, kGroup) + Taps<T>::bytes(s) +
                               Arena::bytes<T>(tasks.rows * s.out_width * w);
  const bool worth_it = s.batch * out.area * s.channels * s.kernel_h * s.kernel_w > kSerialFlops;
  parallel(tasks.total, worth_it, [&](int64_t begin, int64_t end, int thread) {
    Arena mine{arena.next + thread * thread_bytes};
    RowRing<T> ring(s, tasks.rows, kGroup, mine);
    Taps<T> taps(s, mine);
    T* block = mine.take<T>(tasks.rows * s.out_width * w);
    ring.clear();
    int64_t last_group = -1;
    for (int64_t i = begin; i < end; ++i) {
      const auto t = tasks.at(s, i);
      if (t.group != last_group) ring.image = -1;
      last_group = t.group;
      ring.need(s, t.n, t.row, t.rows, [&](int64_t y0, int64_t y1) {
        source.load_rows_into(ring, t.n, t.first_block, t.blocks, y0, y1);
      });
      for (int64_t b = 0; b < t.blocks; ++b) {
        const int64_t block_index = t.first_block + b;
        depthwise_rows(s, ring, taps, b, t.row, t.rows, weights + block_index * taps_per_block, Vec<T>(T(0)),
                       block);
        write_block<1>(block, out, none, t.n, t.row * s.out_width, t.rows * s.out_width, block_index * w,
                       [](Vec<T> x, int, int64_t) __attribute__((always_inline)) { return x; });
      }
    }
  });
}

template <class T>
size_t depthwise_backward_workspace(const DepthwiseBackward& p, int threads) {
  const WeightGradientRuns<T> q(p.shape);
  const int64_t weight =
      Arena::bytes<T>(q.runs * q.tasks.blocks * q.sums) + threads * q.thread_bytes(p.shape);
  const DepthwiseShape s = transposed(p.shape);
  const int64_t rows = depthwise_rows_per_strip(s);
  const int64_t input = Arena::bytes<T>(blocks_of<T>(s.channels) * s.kernel_h * s.kernel_w * Vec<T>::size) +
                        threads * (RowRing<T>::bytes(s, rows, kGroup) + Taps<T>::bytes(s) +
                                   Arena::bytes<T>(rows * s.out_width * Vec<T>::size));
  return maximum(weight, input);
}

template <class T, class S>
void depthwise_backward(const DepthwiseBackward& p, const Parallel& parallel) {
  const Arena arena{static_cast<char*>(p.workspace)};
  if (p.grad_input.data)
    p.wide_grad ? depthwise_input_gradient<T, S, T>(p, arena, parallel)
                : depthwise_input_gradient<T, S, S>(p, arena, parallel);
  if (p.grad_weight)
    p.wide_grad ? depthwise_weight_gradient<T, S, T>(p, arena, parallel)
                : depthwise_weight_gradient<T, S, S>(p, arena, parallel);
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
