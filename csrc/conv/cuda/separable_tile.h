// The parts of the fused separable block that its two products share: where a block's positions lie, a chunk
// of the depthwise result in shared memory, and the epilogue.
#pragma once

#include "conv/cuda/common.h"

namespace fusednn::cuda {

constexpr int kSeparableThreads = 256;
constexpr int kChunk = 32;  // channels of the depthwise result at a time

struct SeparableTiling {
  int64_t positions;  // N H' W'
  bool packed_input;  // [N, H, W, C], 16 bytes of channels at a time
  bool packed_weight, packed_output;
};

// One position of the block's tile: window and result, of channel 0.
struct TilePosition {
  int64_t input, output;  // output < 0: beyond the last position
  int y, x;               // of the window's first tap
};

template <int P>
__device__ void fill_positions(const SeparableForward& p, const SeparableTiling& tiling,
                               TilePosition* table) {
  const DepthwiseShape& s = p.shape;
  const ImageStrides in(s.channels / s.multiplier, s.height, s.width, s.channels_last);
  const ImageStrides out(p.out_channels, s.out_height, s.out_width, s.channels_last);
  for (int i = threadIdx.x; i < P; i += kSeparableThreads) {
    const int64_t position = static_cast<int64_t>(blockIdx.x) * P + i;
    const auto [row, x] = divide(position, s.out_width);
    const auto [image, y] = divide(row, s.out_height);
    const int64_t output = out.offset(image, 0, y, x);
    table[i] = {image * in.n, position < tiling.positions ? output : -1, y * s.stride_h - s.pad_top,
                x * s.stride_w - s.pad_left};
  }
}

// taps [kernel_h kernel_w, kChunk] from channel c0 on; zeros beyond the last channel.
template <class T>
__device__ void load_taps(const SeparableForward& p, int c0, T* taps) {
  const int count = p.shape.kernel_h * p.shape.kernel_w;
  for (int i = threadIdx.x; i < count * kChunk; i += kSeparableThreads) {
    const int64_t c = c0 + i / count;
    const bool here = c < p.shape.channels;
    taps[i % count * kChunk + i / count] =
        here ? static_cast<const T*>(p.depthwise_weight)[c * count + i % count] : narrow<T>(0);
  }
}

// act1(depthwise) at one position for V channels from c0 + c on. K: the size of a square kernel, 0 for any.
template <class T, int K, int V>
__device__ __forceinline__ void depthwise_at(const SeparableForward& p, const TilePosition& at, const T* taps,
                                             int c0, int c, Arithmetic<T> (&z)[V]) {
  const DepthwiseShape& s = p.shape;
  const ImageStrides in(s.channels / s.multiplier, s.height, s.width, s.channels_last);
  const Pack<T, V> bias = load_or_zero<T, V>(p.depthwise_bias, c0 + c);
#pragma unroll
  for (int j = 0; j < V; ++j) z[j] = bias.get(j);
  const int64_t plane = at.input + (c0 + c) / s.multiplier * in.c;
  const int kernel_h = K == 0 ? s.kernel_h : K, kernel_w = K == 0 ? s.kernel_w : K;
#pragma unroll
  for (int u = 0; u < kernel_h; ++u) {
    const int y = at.y + u * s.dilation_h;
    const bool row = inside(y, s.height);
#pragma unroll
    for (int v = 0; v < kernel_w; ++v) {
      const int x = at.x + v * s.dilation_w;
      if (!row || !inside(x, s.width)) continue;
      const Pack<T, V> value = load<T, V>(p.input, plane + y * in.row + x * in.column);
#pragma unroll
      for (int j = 0; j < V; ++j) z[j] += widen(taps[(u * kernel_w + v) * kChunk + c + j]) * value.get(j);
    }
  }
  activate(p.depthwise_activation, z);
}

// Calls write(position of the tile, channel of the chunk, values [V]) for the whole [P, kChunk]; zeros where
// there is no position or channel. Neighbouring threads take what neighbours in memory.
template <class T, int K, int P, class Write>
__device__ void depthwise_chunk(const SeparableForward& p, const SeparableTiling& tiling,
                                const TilePosition* table, const T* taps, int c0, Write&& write) {
  constexpr int V = kWidestAccess / sizeof(T), packs = kChunk / V;
  if (tiling.packed_input) {
    for (int i = threadIdx.x; i < P * packs; i += kSeparableThreads) {
      const int position = i / packs, c = i % packs * V;
      Arithmetic<T> z[V] = {};
      const bool here = table[position].output >= 0 && c0 + c < p.shape.channels;
      if (here) depthwise_at<T, K>(p, table[position], taps, c0, c, z);
      write(position, c, z);
    }
    return;
  }
  for (int i = threadIdx.x; i < P * kChunk; i += kSeparableThreads) {
    const int position = p.shape.channels_last ? i / kChunk : i % P;
    const int c = p.shape.channels_last ? i % kChunk : i / P;
    Arithmetic<T> z[1] = {};
    const bool here = table[position].output >= 0 && c0 + c < p.shape.channels;
    if (here) depthwise_at<T, K>(p, table[position], taps, c0, c, z);
    write(position, c, z);
  }
}

// Activation and residual for N sums, then the store. `at(j)` is the place of the j-th, negative for none;
// `packed`: they are an aligned pack from at(0) on.
template <class T, int N, class At>
__device__ __forceinline__ void finish_outputs(const SeparableForward& p, bool packed, float (&z)[N],
                                               At&& at) {
  activate(p.pointwise_activation, z);
  if (packed) {
    const int64_t first = at(0);
    if (first < 0) return;
    if (p.residual != nullptr) {
      const Pack<T, N> residual = load<T, N>(p.residual, first);
#pragma unroll
      for (int j = 0; j < N; ++j) z[j] += residual.get(j);
    }
    store_values<T>(p.output, first, true, N, z);
    return;
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int64_t place = at(j);
    if (place < 0) continue;
    if (p.residual != nullptr) z[j] += widen(static_cast<const T*>(p.residual)[place]);
    static_cast<T*>(p.output)[place] = narrow<T>(z[j]);
  }
}

template <class T>
__device__ __forceinline__ float output_bias(const SeparableForward& p, int o) {
  return p.pointwise_bias != nullptr ? widen(static_cast<const T*>(p.pointwise_bias)[o]) : 0.0f;
}

}  // namespace fusednn::cuda
