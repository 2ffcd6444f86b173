// Inference of the depthwise-separable block in one pass, norms folded into weights and biases.
//
//   y[c, q]   = act1(b1[c] + sum_{u, v} w1[c, u, v] in[c / m, window of q])
//   out[o, q] = act2(b2[o] + sum_c w2[o, c] y[c, q]) + residual[o, q]         q = a position of an image
//
// Tiling: a block takes P = 64 (O > 256: 32) neighbouring positions of all images laid end to end, and every
// output channel. It makes y for a chunk of 32 channels in shared memory, multiplies it into the sums of all
// O channels, which stay in registers, and drops it: y is never made twice and never leaves the
// multiprocessor. Products: 16-bit types on tensor cores with float sums, y rounded to the type; float32 by
// fused multiply-adds, or as TF32 where the caller allows it. Bytes moved: s (in + out + residual), and
// s |weights| a block (L2), s = item size; unfused adds 2 s N C H' W'. Limits: O <= 512 (float32: 256), at most
// 49 taps, no float64, dense images.
#include "conv/cuda/separable_mma.h"

namespace fusednn::cuda {
namespace {

// 16 x 16 threads; a thread keeps TO x 4 sums, o = thread + 16 i, positions 4 q ... 4 q + 3.
template <int TO>
struct FmaShape {
  static constexpr int outputs = 16 * TO, positions = 64;
  static constexpr int weight_row = outputs + 1,
                       tile_row = positions + 4;  // of [kChunk, ...], against conflicts
  static constexpr size_t tile_bytes = kChunk * tile_row * sizeof(float);
  static constexpr size_t weight_bytes = (kChunk * weight_row * sizeof(float) + 15) / 16 * 16;
  static size_t shared_bytes(int taps) {
    return tile_bytes + weight_bytes + positions * sizeof(TilePosition) +
           static_cast<size_t>(taps) * kChunk * sizeof(float);
  }
};

template <int TO>
__device__ void load_transposed(const SeparableForward& p, int c0, float* weights) {
  using Shape = FmaShape<TO>;
  const int C = static_cast<int>(p.shape.channels);
  for (int i = threadIdx.x; i < Shape::outputs * kChunk; i += kSeparableThreads) {
    const int o = i / kChunk, c = i % kChunk;
    const bool here = o < p.out_channels && c0 + c < C;
    weights[c * Shape::weight_row + o] =
        here ? static_cast<const float*>(p.pointwise_weight)[static_cast<int64_t>(o) * C + c0 + c] : 0.0f;
  }
}

template <int K, int TO>
__global__ void __launch_bounds__(kSeparableThreads, 1)
    separable_fma_kernel(SeparableForward p, SeparableTiling tiling) {
  using Shape = FmaShape<TO>;
  constexpr int P = Shape::positions;
  unsigned char* shared = dynamic_shared<unsigned char>();
  float* tile = reinterpret_cast<float*>(shared);                         // [kChunk, tile_row]
  float* weights = reinterpret_cast<float*>(shared + Shape::tile_bytes);  // [kChunk, weight_row]
  auto* table = reinterpret_cast<TilePosition*>(shared + Shape::tile_bytes + Shape::weight_bytes);
  float* taps = reinterpret_cast<float*>(table + P);  // [taps, kChunk]
  const int thread_o = threadIdx.x % 16, first_position = threadIdx.x / 16 * 4;
  float sums[TO][4] = {};
  fill_positions<P>(p, tiling, table);

  for (int c0 = 0; c0 < p.shape.channels; c0 += kChunk) {
    load_taps(p, c0, taps);
    load_transposed<TO>(p, c0, weights);
    __syncthreads();
    depthwise_chunk<float, K, P>(p, tiling, table, taps, c0,
                                 [&]<int V>(int position, int c, const float (&z)[V]) {
#pragma unroll
                                   for (int j = 0; j < V; ++j)
                                     tile[(c + j) * Shape::tile_row + position] = z[j];
                                 });
    __syncthreads();
#pragma unroll 4
    for (int c = 0; c < kChunk; ++c) {
      const Pack<float, 4> y = load_shared<float, 4>(tile, c * Shape::tile_row + first_position);
#pragma unroll
      for (int i = 0; i < TO; ++i) {
        const float w = weights[c * Shape::weight_row + thread_o + 16 * i];
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += w * y.get(j);
      }
    }
    __syncthreads();
  }

  const int64_t out_c =
      p.shape.channels_last ? 1 : static_cast<int64_t>(p.shape.out_height) * p.shape.out_width;
  const bool packed = tiling.packed_output && !p.shape.channels_last;
  // Not unrolled: there would be as many copies of all activations. The next sums move up to sums[0].
#pragma unroll 1
  for (int o = thread_o; o < p.out_channels; o += 16) {
    const float bias = output_bias<float>(p, o);
    float z[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) z[j] = sums[0][j] + bias;
    finish_outputs<float>(p, packed, z, [&](int j) {
      const int64_t output = table[first_position + j].output;
      return output >= 0 ? output + o * out_c : -1;
    });
#pragma unroll
    for (int i = 0; i < (TO - 1) * 4; ++i) sums[i / 4][i % 4] = sums[i / 4 + 1][i % 4];
  }
}

template <class T>
SeparableTiling tiling_of(const SeparableForward& p) {
  constexpr int V = kWidestAccess / sizeof(T);
  const DepthwiseShape& s = p.shape;
  SeparableTiling t;
  t.positions = s.batch * s.out_height * s.out_width;
  t.packed_input = s.channels_last && s.multiplier == 1 && s.channels % V == 0 &&
                   aligned(kWidestAccess, p.input, p.depthwise_bias);
  t.packed_weight = s.channels % V == 0 && aligned(kWidestAccess, p.pointwise_weight);
  const int64_t neighbours =
      s.channels_last ? p.out_channels : static_cast<int64_t>(s.out_height) * s.out_width;
  t.packed_output = neighbours % V == 0 && aligned(kWidestAccess, p.output, p.residual);
  return t;
}

template <class Kernel>
cudaError_t launch_blocks(Kernel kernel, const SeparableForward& p, const SeparableTiling& tiling,
                          int positions, size_t shared, cudaStream_t stream) {
  const int64_t blocks = ceil_div(tiling.positions, positions);
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kSeparableThreads), shared, stream, p,
                tiling);
}

template <class E, int WO, int OF, int PF>
cudaError_t launch_mma(const SeparableForward& p, cudaStream_t stream) {
  using Shape = MmaShape<E, WO, OF, PF>;
  const DepthwiseShape& s = p.shape;
  const bool threes = s.kernel_h == 3 && s.kernel_w == 3;
  const auto kernel =
      threes ? separable_mma_kernel<E, 3, WO, OF, PF> : separable_mma_kernel<E, 0, WO, OF, PF>;
  return launch_blocks(kernel, p, tiling_of<typename Shape::T>(p), Shape::positions,
                       Shape::shared_bytes(s.kernel_h * s.kernel_w), stream);
}

template <int TO>
cudaError_t launch_fma(const SeparableForward& p, cudaStream_t stream) {
  const DepthwiseShape& s = p.shape;
  const bool threes = s.kernel_h == 3 && s.kernel_w == 3;
  const auto kernel = threes ? separable_fma_kernel<3, TO> : separable_fma_kernel<0, TO>;
  return launch_blocks(kernel, p, tiling_of<float>(p), FmaShape<TO>::positions,
                       FmaShape<TO>::shared_bytes(s.kernel_h * s.kernel_w), stream);
}

template <class E>
cudaError_t launch_half(const SeparableForward& p, cudaStream_t stream) {
  if (p.out_channels <= 64) return launch_mma<E, 4, 1, 2>(p, stream);
  if (p.out_channels <= 256) return launch_mma<E, 8, 2, 4>(p, stream);
  return launch_mma<E, 8, 4, 2>(p, stream);
}

cudaError_t launch_float(const SeparableForward& p, cudaStream_t stream) {
  if (p.allow_tf32) {
    return p.out_channels <= 64 ? launch_mma<Tf32, 4, 1, 2>(p, stream) : launch_mma<Tf32, 8, 2, 4>(p, stream);
  }
  if (p.out_channels <= 64) return launch_fma<4>(p, stream);
  return p.out_channels <= 128 ? launch_fma<8>(p, stream) : launch_fma<16>(p, stream);
}

}  // namespace

cudaError_t separable_forward(const SeparableForward& p, cudaStream_t stream) {
  const DepthwiseShape& s = p.shape;
  const int64_t taps = static_cast<int64_t>(s.kernel_h) * s.kernel_w;
  if (p.out_channels > separable_most_outputs(p.dtype) || taps > kSeparableMostTaps)
    return cudaErrorInvalidValue;
  if (s.batch == 0 || p.out_channels == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::f32:
      return launch_float(p, stream);
    case DType::f16:
      return launch_half<__half>(p, stream);
    case DType::bf16:
      return launch_half<__nv_bfloat16>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fusednn::cuda
