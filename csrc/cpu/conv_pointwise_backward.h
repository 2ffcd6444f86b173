// The middle of the block's backward, strip by strip:
//
//   dz2 = k1 da2 - k0 - (z2 - mean2) k2,  da2 = dout act2'(norm2(z2))      [P, O]
//   dW += dz2^T y1,  y1 = act1(norm1(z1))                                  [O, P] [P, C]
//   da1 = (dz2 W) act1'(norm1(z1))                                         [P, O] [O, C]
//
// Both products take dz2 from the same buffer. dW is summed per thread and then in the threads' order: each
// thread's strips are fixed by the number of threads, so results repeat bitwise for a given number of
// threads.
#pragma once

#include "cpu/conv_train.h"

namespace fusednn::cpu::FUSEDNN_ISA {

// c[M][V][w] += a^T b over `count` pixels: M of a block's channels times V blocks of b.
template <int M, int V, class T>
void outer_tile(int64_t count, const T* a, const T* b, int64_t b_block, T* c, int64_t c_stride) {
  constexpr int w = Vec<T>::size;
  Vec<T> acc[M][V];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) acc[m][v] = Vec<T>(T(0));
  for (int64_t i = 0; i < count; ++i) {
    Vec<T> y[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) y[v] = Vec<T>::load(b + v * b_block + i * w);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<T> x(a[i * w + m]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[m][v] = acc[m][v] + x * y[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      T* to = c + m * c_stride + v * w;
      (Vec<T>::load(to) + acc[m][v]).store(to);
    }
}

// c [O padded][C padded] += a^T b, both by blocks.
template <class T>
void outer_product(int64_t count, const T* a, int64_t a_blocks, const T* b, int64_t b_blocks, int64_t pitch,
                   T* c) {
  constexpr int w = Vec<T>::size;
  constexpr int M = kAccumulators == 24 && w >= 8 ? 8 : w >= 4 ? 4 : 2;
  constexpr int V = 3;
  const int64_t stride = b_blocks * w;
  for (int64_t j = 0; j < b_blocks; j += V) {
    for (int64_t i = 0; i < a_blocks * w; i += M) {
      const T* rows = a + i / w * pitch + i % w;
      T* to = c + i * stride + j * w;
      if (b_blocks - j >= 3)
        outer_tile<M, 3>(count, rows, b + j * pitch, pitch, to, stride);
      else if (b_blocks - j == 2)
        outer_tile<M, 2>(count, rows, b + j * pitch, pitch, to, stride);
      else
        outer_tile<M, 1>(count, rows, b + j * pitch, pitch, to, stride);
    }
  }
}

template <class T, class S>
struct PointwiseBackwardPass {
  static constexpr int w = Vec<T>::size;
  const PointwiseBackward& p;
  Strips strips;
  int64_t blocks1, blocks2, pitch, partial_size, bias_size;
  Pixels<S> grad;
  Pixels<const S> z1, z2;

  explicit PointwiseBackwardPass(const PointwiseBackward& q)
      : p(q),
        strips(q.batch, q.area, q.strip_pixels),
        blocks1(blocks_of<T>(q.channels)),
        blocks2(blocks_of<T>(q.out_channels)),
        pitch(strip_pitch(strips.pixels) * w),
        partial_size(blocks2 * w * blocks1 * w),
        bias_size(blocks2 * w),
        grad(q.grad, q.out_channels, q.area),
        z1(channels_last<S>(q.z1, q.channels, q.area)),
        z2(channels_last<S>(q.z2, q.out_channels, q.area)) {}

  int64_t panel_bytes() const { return Arena::bytes<T>(Panels<T>::size(p.channels, p.out_channels)); }
  int64_t thread_bytes() const {
    return Arena::bytes<T>(partial_size) + Arena::bytes<T>(bias_size) + Arena::bytes<T>(blocks1 * pitch) +
           Arena::bytes<T>(blocks2 * pitch) + Arena::bytes<T>(strips.pixels * kPanel * w);
  }

  // dz2 of a strip; bias [O] += its sums.
  void load_dz2(int64_t n, int64_t first, int64_t count, T* dz2, T* bias) const {
    with_activation(p.activation2, [&]<Activation A>() {
      for (int64_t b = 0; b < blocks2; ++b, dz2 += pitch) {
        const int64_t c = b * w, left = p.out_channels - c;
        load_block(grad, n, first, count, c, dz2);
        const Norm<T> norm(p.norm2, p.out_channels, c);
        const NormGradient<T> gradient(p.coefficients2, p.out_channels, c);
        const S* z = z2.at(n, first, c);
        Vec<T> total(T(0));
        for (int64_t i = 0; i < count; ++i) {
          const Vec<T> x = Vec<T>::load(z + i * p.out_channels, left);
          const Vec<T> da = Vec<T>::load(dz2 + i * w) * derivative<A>(norm(x));
          const Vec<T> dz = gradient(da, x);
          dz.store(dz2 + i * w);
          total = total + dz;
        }
        (Vec<T>::load(bias + c) + total).store(bias + c);
      }
    });
  }

  // dy1 [count][V w] of columns [c, c + V w) becomes da1, with its sums.
  template <int V>
  void finish(int64_t task, int64_t n, int64_t first, int64_t count, int64_t c, T* block) const {
    const Pixels<T> da1({p.da1, true}, p.channels, p.area);
    const int64_t sums_pitch = padded_channels(p.channels);
    T* record = static_cast<T*>(p.sums1) + task * 2 * sums_pitch;
    with_activation(p.activation1, [&]<Activation A>() {
      for (int v = 0; v < V && c < p.channels; ++v, c += w, block += w) {
        const Norm<T> norm(p.norm1, p.channels, c);
        const int64_t left = p.channels - c;
        const S* z = z1.at(n, first, c);
        T* to = da1.at(n, first, c);
        Vec<T> s0[2] = {Vec<T>(T(0)), Vec<T>(T(0))}, s1[2] = {Vec<T>(T(0)), Vec<T>(T(0))};
        for (int64_t i = 0; i < count; ++i) {
          const Vec<T> x = Vec<T>::load(z + i * p.channels, left);
          const Vec<T> da = Vec<T>::load(block + i * V * w) * derivative<A>(norm(x));
          da.store(to + i * p.channels, left);
          s0[i & 1] = s0[i & 1] + da;
          s1[i & 1] = s1[i & 1] + da * (x - norm.mean);
        }
        (s0[0] + s0[1]).store(record + c);
        (s1[0] + s1[1]).store(record + sums_pitch + c);
      }
    });
  }

  void run(int64_t begin, int64_t end, Arena arena, const Panels<T>& panels) const {
    T* partial = arena.take<T>(partial_size);
    T* bias = arena.take<T>(bias_size);
    T* y1 = arena.take<T>(blocks1 * pitch);
    T* dz2 = arena.take<T>(blocks2 * pitch);
    T* block = arena.take<T>(strips.pixels * kPanel * w);
    std::memset(partial, 0, partial_size * sizeof(T));
    std::memset(bias, 0, bias_size * sizeof(T));
    for (int64_t task = begin; task < end; ++task) {
      const auto [n, first, count] = strips.at(task);
      load_dz2(n, first, count, dz2, bias);
      load_activated(p.activation1, z1, p.norm1, n, first, count, y1, pitch / w);
      outer_product(count, dz2, blocks2, y1, blocks1, pitch, partial);
      PrefetchPair ahead;
      for (int64_t i = 0; i < panels.count(); ++i) {
        panels.with_panel(i, [&]<int V>(int64_t column, const T* b) {
          const Pixels<T> da1({p.da1, true}, p.channels, p.area);
          ahead.out = lines_of(da1, n, first, count, column, minimum(V * w, p.channels - column));
          product_panel<V>(count, blocks2, dz2, pitch, b, block, ahead);
          finish<V>(task, n, first, count, column, block);
        });
      }
    }
  }

  // Threads' sums of dW and of the bias, added up in order; `used` threads had work.
  void add_up(const char* threads, int64_t used, const Parallel& parallel) const {
    T *weight = static_cast<T*>(p.grad_weight), *bias = static_cast<T*>(p.grad_bias);
    const auto of = [&](int64_t t) { return reinterpret_cast<const T*>(threads + t * thread_bytes()); };
    const int64_t bias_at = Arena::bytes<T>(partial_size) / sizeof(T);
    parallel(p.out_channels, partial_size > 65536, [&](int64_t begin, int64_t end, int) {
      for (int64_t o = begin; o < end; ++o) {
        for (int64_t c = 0; c < p.channels; c += w) {
          Vec<T> total(T(0));
          for (int64_t t = 0; t < used; ++t) total = total + Vec<T>::load(of(t) + o * blocks1 * w + c);
          total.store(weight + o * p.channels + c, p.channels - c);
        }
        T total(0);
        for (int64_t t = 0; t < used; ++t) total += of(t)[bias_at + o];
        bias[o] = total;
      }
    });
  }
};

template <class T, class S>
size_t pointwise_backward_workspace(const PointwiseBackward& p, int threads) {
  const PointwiseBackwardPass<T, S> pass(p);
  return pass.panel_bytes() + threads * (pass.thread_bytes() + 64);
}

template <class T, class S>
void pointwise_backward(const PointwiseBackward& p, const Parallel& parallel) {
  const PointwiseBackwardPass<T, S> pass(p);
  Arena arena{static_cast<char*>(p.workspace)};
  T* packed = arena.take<T>(Panels<T>::size(p.channels, p.out_channels));
  pack_panels(p.channels, p.out_channels, static_cast<const S*>(p.weight), 1, p.channels, packed, parallel);
  const Panels<T> panels{p.channels, pass.blocks2, packed};
  char* const threads = arena.next;
  char* const worked = threads + parallel.threads * pass.thread_bytes();
  std::memset(worked, 0, parallel.threads);
  parallel(pass.strips.total(), true, [&](int64_t begin, int64_t end, int thread) {
    worked[thread] = 1;
    pass.run(begin, end, Arena{threads + thread * pass.thread_bytes()}, panels);
  });
  int64_t used = 0;
  while (used < parallel.threads && worked[used]) ++used;
  pass.add_up(threads, used, parallel);
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
