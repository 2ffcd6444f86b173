// Training of the depthwise-separable block: the passes that batch statistics force, each with as much fused
// into it as they allow. z2 lies [N, H, W, O]; z1 is made again in every pass that needs it, never written.
//
//   forward   statistics of z1 = depthwise(x)                            (depthwise_forward.h)
//             z2 = act1(norm1(z1)) W^T + b       statistics on the way out
//             out = act2(norm2(z2)) + residual
//   backward  sums of da2, da2 (z2 - mean2)      da2 = dout act2'(norm2(z2))
//             dz2; dW += dz2^T y1; da1 = dz2 W act1'(norm1(z1)); sums of da1, da1 (z1 - mean1)
//             dz1 from da1 and z1 into the depthwise backward            (depthwise_backward.h)
//
// Bytes per pixel, elements, at stride 1: forward 2C + 3O, backward 5C + 4O.
#pragma once

#include "conv/cpu/depthwise_forward.h"
#include "conv/cpu/product.h"

namespace fusednn::cpu::FUSEDNN_ISA {

// y = act(norm(z)) of a strip by blocks of channels, both [C / w][pitch][w].
template <class T>
void activate_strip(Activation activation, const void* norm, int64_t channels, int64_t count, int64_t pitch,
                    const T* z, T* y) {
  constexpr int w = Vec<T>::size;
  with_activation(activation, [&]<Activation A>() {
    for (int64_t c = 0; c < channels; c += w, z += pitch, y += pitch) {
      const Norm<T> normed(norm, channels, c);
      for (int64_t i = 0; i < count * w; i += w) activate<A>(normed(Vec<T>::load(z + i))).store(y + i);
      if (channels - c >= w) continue;
      for (int64_t i = 0; i < count * w; i += w)  // lanes beyond C: zero, whatever the activation makes of it
        Vec<T>::load(y + i, channels - c).store(y + i);
    }
  });
}

template <class S>
Pixels<const S> channels_last(const void* data, int64_t channels, int64_t area) {
  return Pixels<const S>({const_cast<void*>(data), true}, channels, area);
}

template <class T, class S>
struct PointwiseForwardPass {
  static constexpr int w = Vec<T>::size;
  const PointwiseForward& p;
  const DepthwiseShape& s;
  RowStrips strips;
  int64_t pitch;
  DepthwiseSource<T, S> source;
  T *packed, *bias;
  ThreadParts threads;

  PointwiseForwardPass(const PointwiseForward& q, int thread_count, Carver& shared)
      : p(q),
        s(q.shape),
        strips(s),
        pitch(strip_pitch(strips.pixels()) * w),
        source(s, q.input, shared),
        packed(shared.take<T>(Panels<T>::size(q.out_channels, s.channels))),
        bias(shared.take<T>(padded_channels(q.out_channels))),
        threads(thread_count, shared, [&](Carver& own) { Buffers(*this, own); }) {}

  struct Buffers {
    RowRing<T> ring;
    Taps<T> taps;
    T *y1, *block;
    Buffers(const PointwiseForwardPass& pass, Carver& own)
        : ring(pass.s, pass.strips.rows, pass.source.blocks, own),
          taps(pass.s, own),
          y1(own.take<T>(pass.source.blocks * pass.pitch)),
          block(own.take<T>(pass.strips.pixels() * kPanel * w)) {}
  };

  void run(const Parallel& parallel) const {
    source.pack(p.depthwise_weight, p.depthwise_bias);
    pack_panels(p.out_channels, s.channels, static_cast<const S*>(p.weight), s.channels, 1, packed, parallel);
    pack_vector(p.out_channels, static_cast<const S*>(p.bias), bias);
    const int64_t pixels = s.batch * s.out_height * s.out_width;
    const bool worth_it = pixels * s.channels * (p.out_channels + s.kernel_h * s.kernel_w) > kSerialFlops;
    parallel(strips.total(), worth_it,
             [&](int64_t begin, int64_t end, int thread) { run_strips(begin, end, thread); });
  }

  void run_strips(int64_t begin, int64_t end, int thread) const {
    Carver own = threads.of(thread);
    auto [ring, taps, y1, block] = Buffers(*this, own);
    const Panels<T> panels{p.out_channels, source.blocks, packed};
    ring.clear();
    for (int64_t task = begin; task < end; ++task) {
      const auto t = strips.at(task);
      source.make_strip(ring, taps, t.n, t.row, t.rows, y1, pitch);
      activate_strip(p.activation, p.norm, s.channels, t.count, pitch, y1, y1);
      PrefetchPair ahead;
      if (task + 1 < end)
        prefetch_input(s, source.in, ring, strips.at(task + 1).n, strips.at(task + 1).row, strips.rows,
                       ceil_div(t.count, kTilePixels) * panels.count(), ahead);
      for (int64_t i = 0; i < panels.count(); ++i) product(t, task, panels, i, y1, block, ahead);
    }
  }

  void product(const RowStrips::Strip& t, int64_t task, const Panels<T>& panels, int64_t i, const T* y1,
               T* block, PrefetchPair& ahead) const {
    const Pixels<S> z2({p.z2, true}, p.out_channels, strips.height * strips.width),
        none({nullptr, true}, 0, 0);
    panels.with_panel(i, [&]<int V>(int64_t column, const T* b) {
      ahead.out = lines_of(z2, t.n, t.first, t.count, column, minimum(V * w, p.out_channels - column));
      product_panel<V>(t.count, source.blocks, y1, pitch, b, block, ahead);
      constexpr bool narrow_storage = sizeof(S) < sizeof(T);
      if constexpr (narrow_storage) round_to_storage<V, S>(block, t.count, bias + column);
      if (p.statistics)
        strip_statistics<V>(block, t.count, static_cast<T*>(p.statistics) + column, task,
                            padded_channels(p.out_channels), narrow_storage ? nullptr : bias + column);
      write_block<V>(block, z2, none, t.n, t.first, t.count, column,
                     [&](Vec<T> x, int v, int64_t) __attribute__((always_inline)) {
                       return narrow_storage ? x : x + Vec<T>::load(bias + column + v * w);
                     });
    });
  }
};

constexpr int64_t kElementwisePixels = 64;

// A thread's block of pixels.
template <class T>
T* thread_block(void* workspace, int64_t pixels, int thread) {
  return static_cast<T*>(workspace) + thread * pixels * Vec<T>::size;
}

// Whole pixels, channels last throughout: memory in order.
template <Activation A, class T, class S>
void activate_pixels(const NormActivation& p, const S* z, const S* residual, int64_t count, S* out) {
  constexpr int w = Vec<T>::size;
  for (int64_t i = 0; i < count; ++i, z += p.channels, out += p.channels) {
    for (int64_t c = 0; c < p.channels; c += w) {
      Vec<T> x = activate<A>(Norm<T>(p.norm, p.channels, c)(Vec<T>::load(z + c)));
      if (residual) x = x + Vec<T>::load(residual + c);
      x.store(out + c);
    }
    if (residual) residual += p.channels;
  }
}

template <class T, class S>
void norm_activation(const NormActivation& p, const Parallel& parallel) {
  constexpr int w = Vec<T>::size;
  const Strips strips(p.batch, p.area, kElementwisePixels);
  const Pixels<S> z({const_cast<void*>(p.z), true}, p.channels, p.area), out(p.output, p.channels, p.area),
      residual(p.residual, p.channels, p.area);
  parallel(
      strips.total(), p.batch * p.area * p.channels > 32768, [&](int64_t begin, int64_t end, int thread) {
        T* block = thread_block<T>(p.workspace, strips.pixels, thread);
        with_activation(p.activation, [&]<Activation A>() {
          for (int64_t task = end; task-- > begin;) {
            const auto [n, first, count] = strips.at(task);
            if (out.channels_last && p.channels % w == 0) {
              activate_pixels<A, T>(p, z.at(n, first, 0), residual.data ? residual.at(n, first, 0) : nullptr,
                                    count, out.at(n, first, 0));
              continue;
            }
            for (int64_t c = 0; c < p.channels; c += w) {
              const Norm<T> normed(p.norm, p.channels, c);
              load_block(z, n, first, count, c, block);
              write_block<1>(block, out, residual, n, first, count, c,
                             [&](Vec<T> x, int, int64_t)
                                 __attribute__((always_inline)) { return activate<A>(normed(x)); });
            }
          }
        });
      });
}

// Sums of da = grad act'(norm(z)) and da (z - mean) over `count` pixels, V blocks of channels, of which
// `left` channels are there.
template <Activation A, int V, class T, class S, class G>
FUSEDNN_INLINE void sum_columns(const void* norm, int64_t channels, int64_t c, const S* z, int64_t left,
                                const G* grad, int64_t grad_stride, int64_t count, T* record) {
  constexpr int w = Vec<T>::size;
  Vec<T> plain[V], centred[V];
  set_zero(plain);
  set_zero(centred);
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Norm<T> normed(norm, channels, c + v * w);
      const Vec<T> x = Vec<T>::load(z + i * channels + v * w, left - v * w);
      const Vec<T> da = chain<A>(normed(x), Vec<T>::load(grad + i * grad_stride + v * w, left - v * w));
      plain[v] = plain[v] + da;
      centred[v] = centred[v] + da * (x - normed.mean);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    plain[v].store(record + c + v * w);
    centred[v].store(record + padded_channels(channels) + c + v * w);
  }
}

template <class T, class S>
void norm_sums(const NormSums& p, const Parallel& parallel) {
  constexpr int w = Vec<T>::size;
  const RowStrips strips(p.shape);
  const int64_t area = strips.height * strips.width;
  const Pixels<S> grad(p.grad, p.channels, area);
  const Pixels<const S> z = channels_last<S>(p.z, p.channels, area);
  parallel(strips.total(), strips.batch * area * p.channels > 32768,
           [&](int64_t begin, int64_t end, int thread) {
             T* block = thread_block<T>(p.workspace, strips.pixels(), thread);
             with_activation(p.activation, [&]<Activation A>() {
               for (int64_t task = end; task-- > begin;) {
                 const auto t = strips.at(task);
                 T* record = static_cast<T*>(p.sums) + task * 2 * padded_channels(p.channels);
                 int64_t c = 0;
                 for (; grad.channels_last && c + 4 * w <= p.channels; c += 4 * w)
                   sum_columns<A, 4, T>(p.norm, p.channels, c, z.at(t.n, t.first, c), 4 * w,
                                        grad.at(t.n, t.first, c), p.channels, t.count, record);
                 for (; c < p.channels; c += w) {
                   const int64_t left = p.channels - c;
                   load_block(grad, t.n, t.first, t.count, c, block);
                   sum_columns<A, 1, T>(p.norm, p.channels, c, z.at(t.n, t.first, c), left, block, w, t.count,
                                        record);
                 }
               }
             });
           });
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
