// The fused block's product on tensor cores: [O, C] times the tile's [C, P], kChunk channels at a time.
//
// 8 warps, WO of them along O; a warp keeps OF x PF fragments of 16 x 16 sums. The chunk of the pointwise
// weight and the depthwise tile lie in shared memory, both with channels innermost.
#pragma once

#include <mma.h>

#include "conv/cuda/separable_tile.h"

namespace fusednn::cuda {

struct Tf32 {};

template <class E>
struct Operand {
  using type = E;  // in memory
  using fragment = E;
  static constexpr int k = 16;
  __device__ static E round(float x) { return narrow<E>(x); }
};

template <>
struct Operand<Tf32> {
  using type = float;
  using fragment = nvcuda::wmma::precision::tf32;
  static constexpr int k = 8;
  __device__ static float round(float x) { return nvcuda::wmma::__float_to_tf32(x); }
};

template <class E, int WO, int OF, int PF>
struct MmaShape {
  using T = typename Operand<E>::type;
  static constexpr int outputs = WO * OF * 16, positions = kSeparableThreads / 32 / WO * PF * 16;
  static constexpr int row =
      kChunk + 16 / static_cast<int>(sizeof(T));  // of both tiles, padded against conflicts
  static constexpr int stage_row = 20;            // of a warp's 16 x 16 sums
  static constexpr size_t stage_bytes = kSeparableThreads / 32 * 16 * stage_row * sizeof(float);
  static constexpr size_t tile_bytes = (outputs + positions) * row * sizeof(T);
  static constexpr size_t main_bytes = tile_bytes > stage_bytes ? tile_bytes : stage_bytes;
  static size_t shared_bytes(int taps) {
    return main_bytes + positions * sizeof(TilePosition) + static_cast<size_t>(taps) * kChunk * sizeof(T);
  }
};

// weights [outputs, row] from channel c0 on; zeros beyond O and C.
template <class E, int Outputs, int Row>
__device__ void load_pointwise(const SeparableForward& p, bool packed, int c0,
                               typename Operand<E>::type* weights) {
  using T = typename Operand<E>::type;
  constexpr int V = kWidestAccess / sizeof(T), packs = kChunk / V;
  const int C = static_cast<int>(p.shape.channels);
  if (packed) {
    for (int i = threadIdx.x; i < Outputs * packs; i += kSeparableThreads) {
      const int o = i / packs, c = i % packs * V;
      const bool here = o < p.out_channels && c0 + c < C;
      Pack<T, V> pack =
          load_or_zero<T, V>(here ? p.pointwise_weight : nullptr, static_cast<int64_t>(o) * C + c0 + c);
#pragma unroll
      for (int j = 0; j < V; ++j) pack.items[j] = Operand<E>::round(pack.get(j));
      store_shared(weights, o * Row + c, pack);
    }
    return;
  }
  for (int i = threadIdx.x; i < Outputs * kChunk; i += kSeparableThreads) {
    const int o = i / kChunk, c = i % kChunk;
    const bool here = o < p.out_channels && c0 + c < C;
    const T* weight = static_cast<const T*>(p.pointwise_weight);
    weights[o * Row + c] =
        Operand<E>::round(here ? widen(weight[static_cast<int64_t>(o) * C + c0 + c]) : 0.0f);
  }
}

// A warp's 16 x 16 sums, staged [position, o] in [N, H, W, C] and [o, position] in [N, C, H, W]; each lane
// takes 8 neighbours of a row.
template <class T, int StageRow>
__device__ void store_fragment(const SeparableForward& p, bool packed, const TilePosition* table,
                               const float* stage, int first_o, int first_position) {
  constexpr int V = kWidestAccess / sizeof(T);
  const bool last = p.shape.channels_last;
  const int64_t out_c = last ? 1 : static_cast<int64_t>(p.shape.out_height) * p.shape.out_width;
  const int lane = threadIdx.x % 32, major = lane / 2;
#pragma unroll 1
  for (int group = 0; group < 8 / V; ++group) {
    const int minor = lane % 2 * 8 + group * V;
    const int o = first_o + (last ? minor : major), position = first_position + (last ? major : minor);
    float z[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int at_o = o + (last ? j : 0);
      z[j] = stage[major * StageRow + minor + j] + (at_o < p.out_channels ? output_bias<T>(p, at_o) : 0.0f);
    }
    finish_outputs<T>(p, packed, z, [&](int j) {
      const int at_o = o + (last ? j : 0);
      const int64_t plane = table[position + (last ? 0 : j)].output;
      return at_o < p.out_channels && plane >= 0 ? plane + at_o * out_c : -1;
    });
  }
}

template <class E, int K, int WO, int OF, int PF>
__global__ void __launch_bounds__(kSeparableThreads, 1)
    separable_mma_kernel(SeparableForward p, SeparableTiling tiling) {
  namespace wmma = nvcuda::wmma;
  using Shape = MmaShape<E, WO, OF, PF>;
  using T = typename Shape::T;
  using Fragment = typename Operand<E>::fragment;
  constexpr int k = Operand<E>::k, row = Shape::row, P = Shape::positions;
  unsigned char* shared = dynamic_shared<unsigned char>();
  T* weights = reinterpret_cast<T*>(shared);  // [outputs, row]
  T* tile = weights + Shape::outputs * row;   // [P, row]
  auto* table = reinterpret_cast<TilePosition*>(shared + Shape::main_bytes);
  T* taps = reinterpret_cast<T*>(table + P);  // [taps, kChunk]
  const int warp = threadIdx.x / 32, first_o = warp % WO * OF * 16, first_position = warp / WO * PF * 16;

  wmma::fragment<wmma::accumulator, 16, 16, k, float> sums[OF][PF];
#pragma unroll
  for (int i = 0; i < OF * PF; ++i) wmma::fill_fragment(sums[i / PF][i % PF], 0.0f);
  fill_positions<P>(p, tiling, table);

  for (int c0 = 0; c0 < p.shape.channels; c0 += kChunk) {
    load_taps(p, c0, taps);
    load_pointwise<E, Shape::outputs, row>(p, tiling.packed_weight, c0, weights);
    __syncthreads();
    depthwise_chunk<T, K, P>(p, tiling, table, taps, c0,
                             [&]<int V>(int position, int c, const float (&z)[V]) {
                               Pack<T, V> pack;
#pragma unroll
                               for (int j = 0; j < V; ++j) pack.items[j] = Operand<E>::round(z[j]);
                               store_shared(tile, position * row + c, pack);
                             });
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kChunk; step += k) {
      wmma::fragment<wmma::matrix_b, 16, 16, k, Fragment, wmma::col_major> b[PF];
#pragma unroll
      for (int j = 0; j < PF; ++j)
        wmma::load_matrix_sync(b[j], tile + (first_position + j * 16) * row + step, row);
#pragma unroll
      for (int i = 0; i < OF; ++i) {
        if (first_o + i * 16 >= p.out_channels) continue;
        wmma::fragment<wmma::matrix_a, 16, 16, k, Fragment, wmma::row_major> a;
        wmma::load_matrix_sync(a, weights + (first_o + i * 16) * row + step, row);
#pragma unroll
        for (int j = 0; j < PF; ++j) wmma::mma_sync(sums[i][j], a, b[j], sums[i][j]);
      }
    }
    __syncthreads();
  }

  float* stage = reinterpret_cast<float*>(shared) + warp * 16 * Shape::stage_row;
  const wmma::layout_t layout = p.shape.channels_last ? wmma::mem_col_major : wmma::mem_row_major;
  // Not unrolled: there would be as many copies of all activations.
#pragma unroll 1
  for (int f = 0; f < OF * PF; ++f) {
    const int o = first_o + f / PF * 16, position = first_position + f % PF * 16;
    if (o >= p.out_channels) break;
#pragma unroll
    for (int i = 0; i < OF * PF; ++i) {
      if (i == f) wmma::store_matrix_sync(stage, sums[i / PF][i % PF], Shape::stage_row, layout);
    }
    __syncwarp();
    store_fragment<T, Shape::stage_row>(p, tiling.packed_output, table, stage, o, position);
    __syncwarp();
  }
}

}  // namespace fusednn::cuda
