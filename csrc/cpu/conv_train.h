// Training of the depthwise-separable block: the passes that batch statistics force, each with as much fused
// into it as they allow. z1, z2 lie [N, H, W, C]; everything else is made again from them.
//
//   forward   z1 = depthwise(x)                  statistics of z1 on the way out (conv_depthwise_forward.h)
//             z2 = act1(norm1(z1)) W^T + b       norm and activation on the way in, statistics on the way out
//             out = act2(norm2(z2)) + residual
//   backward  sums of da2, da2 (z2 - mean2)      da2 = dout act2'(norm2(z2))
//             dz2; dW += dz2^T y1; da1 = dz2 W act1'(norm1(z1)); sums of da1, da1 (z1 - mean1)
//             dz1 from da1 and z1 into the depthwise backward (conv_depthwise_backward.h)
//
// Bytes per pixel, elements: forward 3C + 3O (z1 written and read, z2 likewise), backward 9C + 4O.
#pragma once

#include "cpu/conv_product.h"
#include "cpu/conv_statistics.h"
#include "cpu/conv_strip.h"

namespace fusednn::cpu::FUSEDNN_ISA {

// y = act(norm(z)) of a strip, to [C / w][pitch][w].
template <class T, class S>
void load_activated(Activation activation, const Pixels<const S>& z, const void* norm, int64_t n,
                    int64_t first, int64_t count, T* strip, int64_t pitch) {
  constexpr int w = Vec<T>::size;
  with_activation(activation, [&]<Activation A>() {
    for (int64_t c = 0; c < z.channels; c += w, strip += pitch * w) {
      const Norm<T> normed(norm, z.channels, c);
      const S* from = z.at(n, first, c);
      for (int64_t i = 0; i < count; ++i)
        activate<A>(normed(Vec<T>::load(from + i * z.channels, z.channels - c))).store(strip + i * w);
      if (z.channels - c >= w) continue;
      for (int64_t i = 0; i < count; ++i)  // lanes beyond C: zero, whatever the activation makes of it
        Vec<T>::load(strip + i * w, z.channels - c).store(strip + i * w);
    }
  });
}

template <class S>
Pixels<const S> channels_last(const void* data, int64_t channels, int64_t area) {
  return Pixels<const S>({const_cast<void*>(data), true}, channels, area);
}

template <class T>
struct PointwiseForwardBytes {
  int64_t panels, bias, strip, block;
  explicit PointwiseForwardBytes(const PointwiseForward& p) {
    constexpr int w = Vec<T>::size;
    const Strips strips(p.batch, p.area, p.strip_pixels);
    panels = Arena::bytes<T>(Panels<T>::size(p.out_channels, p.channels));
    bias = Arena::bytes<T>(padded_channels(p.out_channels));
    strip = Arena::bytes<T>(blocks_of<T>(p.channels) * strip_pitch(strips.pixels) * w);
    block = Arena::bytes<T>(strips.pixels * kPanel * w);
  }
  int64_t all(int threads) const { return panels + bias + threads * (strip + block); }
};

template <class T, class S>
void pointwise_forward(const PointwiseForward& p, const Parallel& parallel) {
  constexpr int w = Vec<T>::size;
  const PointwiseForwardBytes<T> bytes(p);
  const Strips strips(p.batch, p.area, p.strip_pixels);
  const Pixels<const S> z1 = channels_last<S>(p.z1, p.channels, p.area);
  const Pixels<S> z2({p.z2, true}, p.out_channels, p.area), none({nullptr, true}, 0, 0);
  const int64_t blocks = blocks_of<T>(p.channels), pitch = strip_pitch(strips.pixels);
  Arena arena{static_cast<char*>(p.workspace)};
  T* packed = arena.take<T>(Panels<T>::size(p.out_channels, p.channels));
  T* bias = arena.take<T>(padded_channels(p.out_channels));
  pack_panels(p.out_channels, p.channels, static_cast<const S*>(p.weight), p.channels, 1, packed, parallel);
  pack_vector(p.out_channels, static_cast<const S*>(p.bias), bias);
  const Panels<T> panels{p.out_channels, blocks, packed};
  const bool worth_it = strips.total() * strips.pixels * p.channels * p.out_channels > kSerialFlops;
  parallel(strips.total(), worth_it, [&](int64_t begin, int64_t end, int thread) {
    Arena mine{arena.next + thread * (bytes.strip + bytes.block)};
    T* y1 = mine.take<T>(blocks * pitch * w);
    T* block = mine.take<T>(strips.pixels * kPanel * w);
    for (int64_t task = begin; task < end; ++task) {
      const auto [n, first, count] = strips.at(task);
      load_activated(p.activation, z1, p.norm, n, first, count, y1, pitch);
      PrefetchPair ahead;
      for (int64_t i = 0; i < panels.count(); ++i) {
        panels.with_panel(i, [&]<int V>(int64_t column, const T* b) {
          const int64_t left = minimum(V * w, p.out_channels - column);
          ahead.out = lines_of(z2, n, first, count, column, left);
          product_panel<V>(count, blocks, y1, pitch * w, b, block, ahead);
          constexpr bool narrow_storage = sizeof(S) < sizeof(T);
          if constexpr (narrow_storage) settle<V, S>(block, count, bias + column);
          if (p.statistics)
            strip_statistics<V>(block, count, static_cast<T*>(p.statistics) + column, task,
                                padded_channels(p.out_channels), narrow_storage ? nullptr : bias + column);
          write_block<V>(block, z2, none, n, first, count, column,
                         [&](Vec<T> x, int v, int64_t) __attribute__((always_inline)) {
                           return narrow_storage ? x : x + Vec<T>::load(bias + column + v * w);
                         });
        });
      }
    }
  });
}

constexpr int64_t kElementwisePixels = 64;

template <class T, class S>
void norm_activation(const NormActivation& p, const Parallel& parallel) {
  constexpr int w = Vec<T>::size;
  const Strips strips(p.batch, p.area, kElementwisePixels);
  const Pixels<S> z({const_cast<void*>(p.z), true}, p.channels, p.area), out(p.output, p.channels, p.area),
      residual(p.residual, p.channels, p.area);
  const int64_t bytes = Arena::bytes<T>(strips.pixels * w);
  parallel(strips.total(), p.batch * p.area * p.channels > 32768,
           [&](int64_t begin, int64_t end, int thread) {
             Arena mine{static_cast<char*>(p.workspace) + thread * bytes};
             T* block = mine.take<T>(strips.pixels * w);
             with_activation(p.activation, [&]<Activation A>() {
               for (int64_t task = begin; task < end; ++task) {
                 const auto [n, first, count] = strips.at(task);
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

// da = grad act'(norm(z)) of one block, in place over the gradient [count][w]; sums of da and da (z - mean).
template <Activation A, class T, class S>
FUSEDNN_INLINE void activation_backward(const Norm<T>& norm, const S* z, int64_t z_stride, int64_t left,
                                        int64_t count, T* grad, Vec<T>& plain, Vec<T>& centred) {
  constexpr int w = Vec<T>::size;
  Vec<T> s0[2] = {Vec<T>(T(0)), Vec<T>(T(0))}, s1[2] = {Vec<T>(T(0)), Vec<T>(T(0))};
  for (int64_t i = 0; i < count; ++i) {
    const Vec<T> x = Vec<T>::load(z + i * z_stride, left);
    const Vec<T> da = Vec<T>::load(grad + i * w) * derivative<A>(norm(x));
    da.store(grad + i * w);
    s0[i & 1] = s0[i & 1] + da;
    s1[i & 1] = s1[i & 1] + da * (x - norm.mean);
  }
  plain = s0[0] + s0[1];
  centred = s1[0] + s1[1];
}

template <class T, class S>
void norm_sums(const NormSums& p, const Parallel& parallel) {
  constexpr int w = Vec<T>::size;
  const Strips strips(p.batch, p.area, p.strip_pixels);
  const Pixels<S> grad(p.grad, p.channels, p.area);
  const Pixels<const S> z = channels_last<S>(p.z, p.channels, p.area);
  const int64_t bytes = Arena::bytes<T>(strips.pixels * w), pitch = padded_channels(p.channels);
  parallel(strips.total(), p.batch * p.area * p.channels > 32768,
           [&](int64_t begin, int64_t end, int thread) {
             Arena mine{static_cast<char*>(p.workspace) + thread * bytes};
             T* block = mine.take<T>(strips.pixels * w);
             with_activation(p.activation, [&]<Activation A>() {
               for (int64_t task = begin; task < end; ++task) {
                 const auto [n, first, count] = strips.at(task);
                 T* record = static_cast<T*>(p.sums) + task * 2 * pitch;
                 for (int64_t c = 0; c < p.channels; c += w) {
                   load_block(grad, n, first, count, c, block);
                   Vec<T> plain, centred;
                   activation_backward<A>(Norm<T>(p.norm, p.channels, c), z.at(n, first, c), p.channels,
                                          p.channels - c, count, block, plain, centred);
                   plain.store(record + c);
                   centred.store(record + pitch + c);
                 }
               }
             });
           });
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
