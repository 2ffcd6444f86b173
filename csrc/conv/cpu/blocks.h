// Images by blocks of channels: [C / w][pixels][w], w = the vector's width, lanes beyond C zero. Everything
// that the conv kernels compute on lies so, in per-thread buffers; this file brings pixels in from
// [N, H, W, C] or [N, C, H, W] and takes them out again, through transposes of w x w elements in registers.
#pragma once

#include "conv/cpu/params.h"
#include "core/cpu/transpose.h"

namespace fusednn::cpu::FUSEDNN_ISA {

// Cuts `count` pixels into runs of w, the last of which goes back over its neighbour's rather than being short.
template <class T, class F>
FUSEDNN_INLINE void for_runs(int64_t count, const F& f) {
  constexpr int w = Vec<T>::size;
  for (int64_t i = 0; i < count; i += w)
    f(count >= w ? minimum(i, count - w) : int64_t{0}, minimum(count, int64_t{w}));
}

// Pixels of `channels` <= w planes, each plane `stride` from the last: f(first, vectors of w channels, pixels).
template <class T, class S, class F>
FUSEDNN_INLINE void read_planes(const S* planes, int64_t stride, int64_t channels, int64_t count,
                                const F& f) {
  constexpr int w = Vec<T>::size;
  for_runs<T>(count, [&](int64_t at, int64_t n) __attribute__((always_inline)) {
    Vec<T> x[w];
    if (channels >= w && n == w) {
#pragma GCC unroll 16
      for (int c = 0; c < w; ++c) x[c] = Vec<T>::load(planes + c * stride + at);
    } else {
#pragma GCC unroll 16
      for (int c = 0; c < w; ++c)
        x[c] = c < channels ? Vec<T>::load(planes + c * stride + at, n) : Vec<T>(T(0));
    }
    transpose(x);
    f(at, x, n);
  });
}

// At most w channels of `count` pixels to rows `width` apart: vectors as they lie, or planes transposed.
template <class T, class S>
void load_columns(const S* from, int64_t channel_stride, int64_t pixel_stride, int64_t channels,
                  int64_t count, T* to, int64_t width) {
  constexpr int w = Vec<T>::size;
  if (channel_stride == 1) {
    for (int64_t i = 0; i < count; ++i) Vec<T>::load(from + i * pixel_stride, channels).store(to + i * width);
    return;
  }
  read_planes<T>(from, channel_stride, channels, count,
                 [&](int64_t at, const Vec<T>(&v)[w], int64_t pixels) __attribute__((always_inline)) {
#pragma GCC unroll 16
                   for (int i = 0; i < w; ++i) {
                     if (i >= pixels) break;
                     v[i].store(to + (at + i) * width);
                   }
                 });
}

// A dense image [N, C, H W] or [N, H W, C] of elements S.
template <class S>
struct Pixels {
  S* data;
  bool channels_last;
  int64_t channels, area;

  Pixels(Image image, int64_t c, int64_t hw)
      : data(static_cast<S*>(image.data)), channels_last(image.channels_last), channels(c), area(hw) {}
  FUSEDNN_INLINE S* at(int64_t n, int64_t pixel, int64_t channel) const {
    return data + n * channels * area + (channels_last ? pixel * channels + channel : channel * area + pixel);
  }
};

// Writes pixels [first, first + count) of image n, channels [channel, channel + V w), from block [count][V w];
// `epilogue(x, v, i)` sees each vector of channels first. `residual`, where there is one, is added after it.
template <int V, class T, class S, class F>
void write_block(const T* block, const Pixels<S>& out, const Pixels<S>& residual, int64_t n, int64_t first,
                 int64_t count, int64_t channel, const F& epilogue) {
  constexpr int w = Vec<T>::size;
  for (int v = 0; v < V; ++v, channel += w, block += w) {
    const int64_t left = out.channels - channel;
    if (left <= 0) return;
    S* to = out.at(n, first, channel);
    const S* add = residual.data ? residual.at(n, first, channel) : nullptr;
    if (out.channels_last) {
      for (int64_t i = 0; i < count; ++i) {
        Vec<T> x = epilogue(Vec<T>::load(block + i * V * w), v, i);
        if (add) x = x + Vec<T>::load(add + i * out.channels, left);
        x.store(to + i * out.channels, left);
      }
      continue;
    }
    for_runs<T>(count, [&](int64_t at, int64_t pixels) __attribute__((always_inline)) {
      Vec<T> x[w];
#pragma GCC unroll 16
      for (int i = 0; i < w; ++i)
        x[i] = i < pixels ? epilogue(Vec<T>::load(block + (at + i) * V * w), v, at + i) : Vec<T>(T(0));
      transpose(x);
#pragma GCC unroll 16
      for (int c = 0; c < w; ++c) {
        if (c >= left) break;
        const int64_t offset = c * out.area + at;
        if (add) x[c] = x[c] + Vec<T>::load(add + offset, pixels);
        x[c].store(to + offset, pixels);
      }
    });
  }
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
