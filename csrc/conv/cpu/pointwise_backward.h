// The middle of the block's backward, strip by strip:
//
//   dz2 = k1 da2 - k0 - (z2 - mean2) k2,  da2 = dout act2'(norm2(z2))      [P, O]
//   dW += dz2^T y1,  y1 = act1(norm1(z1))                                  [O, P] [P, C]
//   da1 = (dz2 W) act1'(norm1(z1))                                         [P, O] [O, C]
//
// Both products take dz2 from the same buffer. dW is summed per thread and then in the threads' order: each
// thread's strips are fixed by the number of threads, so results repeat bitwise for a given number.
#pragma once

#include "conv/cpu/train.h"

namespace fusednn::cpu::FUSEDNN_ISA {

// c[M][V][w] (+)= a^T b over `count` pixels: M of a block's channels times V blocks of b.
template <int M, int V, class T>
void outer_tile(int64_t count, const T* a, const T* b, int64_t b_block, T* c, int64_t c_stride,
                bool accumulate) {
  constexpr int w = Vec<T>::size;
  Vec<T> acc[M][V];
  set_zero(acc);
  prefetch_tile<M, V>(c, c_stride);
  for (int64_t i = 0; i < count; ++i) {
    __builtin_prefetch(a + b_block + i * w);
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
  store_tile(acc, c, c_stride, accumulate);
}

// c [O padded][C padded] (+)= a^T b, both by blocks.
template <class T>
void outer_product(int64_t count, const T* a, int64_t a_blocks, const T* b, int64_t b_blocks, int64_t pitch,
                   T* c, bool accumulate) {
  constexpr int w = Vec<T>::size;
  constexpr int M = kAccumulators == 24 && w >= 8 ? 8 : w >= 4 ? 4 : 2;
  constexpr int V = 3;
  const int64_t stride = b_blocks * w;
  for (int64_t j = 0; j < b_blocks; j += V) {
    for (int64_t i = 0; i < a_blocks * w; i += M) {
      const T* rows = a + i / w * pitch + i % w;
      T* to = c + i * stride + j * w;
      with_count<V>(minimum(V, b_blocks - j), [&]<int N>() {
        outer_tile<M, N>(count, rows, b + j * pitch, pitch, to, stride, accumulate);
      });
    }
  }
}

template <class T, class S>
struct PointwiseBackwardPass {
  static constexpr int w = Vec<T>::size;
  const PointwiseBackward& p;
  const DepthwiseShape& s;
  RowStrips strips;
  int64_t channels, area, blocks1, blocks2, pitch, partial_size, bias_size;
  Pixels<S> grad;
  Pixels<const S> z2;
  DepthwiseSource<T, S> source;
  T* packed;
  char* worked;  // of each thread: whether it had work
  ThreadParts threads;

  PointwiseBackwardPass(const PointwiseBackward& q, int thread_count, Carver& shared)
      : p(q),
        s(q.shape),
        strips(s),
        channels(s.channels),
        area(strips.height * strips.width),
        blocks1(blocks_of<T>(channels)),
        blocks2(blocks_of<T>(q.out_channels)),
        pitch(strip_pitch(strips.pixels()) * w),
        partial_size(blocks2 * w * blocks1 * w),
        bias_size(blocks2 * w),
        grad(q.grad, q.out_channels, area),
        z2(channels_last<S>(q.z2, q.out_channels, area)),
        source(s, q.input, shared),
        packed(shared.take<T>(Panels<T>::size(channels, q.out_channels))),
        worked(shared.take<char>(thread_count)),
        threads(thread_count, shared, [&](Carver& own) { Buffers(*this, own); }) {}

  struct Buffers {
    T *partial, *bias;  // sums of dW and of its bias
    RowRing<T> ring;
    Taps<T> taps;
    T *z1, *y1, *dz2, *block;
    Buffers(const PointwiseBackwardPass& pass, Carver& own)
        : partial(own.take<T>(pass.partial_size)),
          bias(own.take<T>(pass.bias_size)),
          ring(pass.s, pass.strips.rows, pass.blocks1, own),
          taps(pass.s, own),
          z1(own.take<T>(pass.blocks1 * pass.pitch)),
          y1(own.take<T>(pass.blocks1 * pass.pitch)),
          dz2(own.take<T>(pass.blocks2 * pass.pitch)),
          block(own.take<T>(pass.strips.pixels() * kPanel * w)) {}
  };

  // dz2 of V blocks of channels from c on, to [V][pitch][w]; their sums to bias [O].
  template <Activation A, int V, class G>
  void dz2_columns(const S* z, const G* from, int64_t stride, int64_t c, int64_t count, T* dz2,
                   T* bias) const {
    const int64_t O = p.out_channels, left = O - c;
    Vec<T> total[V];
    set_zero(total);
    for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<T> x = Vec<T>::load(z + i * O + v * w, left - v * w);
        Vec<T> dz = chain<A>(Norm<T>(p.norm2, O, c + v * w)(x),
                             Vec<T>::load(from + i * stride + v * w, left - v * w));
        if (p.coefficients2) dz = NormGradient<T>(p.coefficients2, O, c + v * w)(dz, x);
        dz.store(dz2 + v * pitch + i * w);
        total[v] = total[v] + dz;
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) (Vec<T>::load(bias + c + v * w) + total[v]).store(bias + c + v * w);
  }

  void load_dz2(const RowStrips::Strip& t, T* dz2, T* bias) const {
    with_activation(p.activation2, [&]<Activation A>() {
      int64_t c = 0;
      constexpr int V = 4;
      for (; grad.channels_last && c + V * w <= p.out_channels; c += V * w, dz2 += V * pitch)
        dz2_columns<A, V>(z2.at(t.n, t.first, c), grad.at(t.n, t.first, c), p.out_channels, c, t.count, dz2,
                          bias);
      for (; c < p.out_channels; c += w, dz2 += pitch) {
        load_block(grad, t.n, t.first, t.count, c, dz2);
        dz2_columns<A, 1>(z2.at(t.n, t.first, c), dz2, w, c, t.count, dz2, bias);
      }
    });
  }

  // dy1 [count][V w] of columns [c, c + V w) becomes da1, with its sums.
  template <int V>
  void finish(const RowStrips::Strip& t, int64_t task, int64_t c, const T* block, const T* z1) const {
    const int64_t sums_pitch = padded_channels(channels);
    T* record = static_cast<T*>(p.sums1) + task * 2 * sums_pitch;
    z1 += c / w * pitch;
    with_activation(p.activation1, [&]<Activation A>() {
      for (int v = 0; v < V && c < channels; ++v, c += w, block += w, z1 += pitch) {
        const Norm<T> norm(p.norm1, channels, c);
        T* to = da1(t, c);
        Vec<T> s0[2] = {Vec<T>(T(0)), Vec<T>(T(0))}, s1[2] = {Vec<T>(T(0)), Vec<T>(T(0))};
        for (int64_t i = 0; i < t.count; ++i) {
          const Vec<T> x = Vec<T>::load(z1 + i * w);
          const Vec<T> da = chain<A>(norm(x), Vec<T>::load(block + i * V * w));
          da.store(to + i * w);
          s0[i & 1] = s0[i & 1] + da;
          s1[i & 1] = s1[i & 1] + da * (x - norm.mean);
        }
        (s0[0] + s0[1]).store(record + c);
        (s1[0] + s1[1]).store(record + sums_pitch + c);
      }
    });
  }

  T* da1(const RowStrips::Strip& t, int64_t c) const {
    return static_cast<T*>(p.da1) + ((t.n * blocks1 + c / w) * area + t.first) * w;
  }

  void run_strips(int64_t begin, int64_t end, int thread) const {
    worked[thread] = 1;
    Carver own = threads.of(thread);
    Buffers b(*this, own);
    const Panels<T> panels{channels, blocks2, packed};
    std::memset(b.bias, 0, bias_size * sizeof(T));
    b.ring.clear();
    for (int64_t task = begin; task < end; ++task) {
      const auto t = strips.at(task);
      load_dz2(t, b.dz2, b.bias);
      source.make_strip(b.ring, b.taps, t.n, t.row, t.rows, b.z1, pitch);
      activate_strip(p.activation1, p.norm1, channels, t.count, pitch, b.z1, b.y1);
      outer_product(t.count, b.dz2, blocks2, b.y1, blocks1, pitch, b.partial, task > begin);
      PrefetchPair ahead;
      if (task + 1 < end)
        prefetch_input(s, source.in, b.ring, strips.at(task + 1).n, strips.at(task + 1).row, strips.rows,
                       ceil_div(t.count, kTilePixels) * panels.count(), ahead);
      for (int64_t i = 0; i < panels.count(); ++i) {
        panels.with_panel(i, [&]<int V>(int64_t column, const T* panel) {
          ahead.out = {reinterpret_cast<const char*>(da1(t, column)), area * int64_t{sizeof(Vec<T>)},
                       t.count * int64_t{sizeof(Vec<T>)}, minimum(V, blocks1 - column / w)};
          product_panel<V>(t.count, blocks2, b.dz2, pitch, panel, b.block, ahead);
          finish<V>(t, task, column, b.block, b.z1);
        });
      }
    }
  }

  // Threads' sums of dW and of the bias, added up in order.
  void add_up(const Parallel& parallel) const {
    T *weight = static_cast<T*>(p.grad_weight), *bias = static_cast<T*>(p.grad_bias);
    const auto partial = [&](int t) { return reinterpret_cast<const T*>(threads.base + t * threads.bytes); };
    Carver own = threads.of(0);
    const int64_t bias_at = Buffers(*this, own).bias - partial(0);
    int used = 0;
    while (used < parallel.threads && worked[used]) ++used;
    parallel(p.out_channels, partial_size > 16384, [&](int64_t begin, int64_t end, int) {
      for (int64_t o = begin; o < end; ++o) {
        for (int64_t c = 0; c < channels; c += w) {
          Vec<T> total(T(0));
          for (int t = 0; t < used; ++t) total = total + Vec<T>::load(partial(t) + o * blocks1 * w + c);
          total.store(weight + o * channels + c, channels - c);
        }
        T total(0);
        for (int t = 0; t < used; ++t) total += partial(t)[bias_at + o];
        bias[o] = total;
      }
    });
  }

  void run(const Parallel& parallel) const {
    source.pack(p.depthwise_weight, p.depthwise_bias);
    pack_panels(channels, p.out_channels, static_cast<const S*>(p.weight), 1, channels, packed, parallel);
    std::memset(worked, 0, parallel.threads);
    parallel(strips.total(), true,
             [&](int64_t begin, int64_t end, int thread) { run_strips(begin, end, thread); });
    add_up(parallel);
  }
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
