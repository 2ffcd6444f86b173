// Weight and bias gradients of a depthwise convolution, from the gradient d of its result before the activation.
//
//   grad_w[c, u, v] = sum_{n, y, x} d[n, c, y, x] in[n, c / m, s y + d u - p, s x + d v - p]
//   grad_b[c]       = sum_{n, y, x} d[n, c, y, x]
//
// Two passes, without atomics: each block sums, in float (double for double), a range of rows [n, y] for its
// channels into partials [splits, taps + 1, C], the last row being the bias's; then one thread per sum adds
// the splits in order. Same shape, same bits.
//
// Tiling: a block is [position lanes, channel lanes]. [N, C, H, W]: one channel, 128 positions. [N, H, W, C]:
// up to 32 packs of channels. Kernel 3, 5, 7 with stride 1, 2: a thread takes 4 neighbouring outputs at a
// time and holds all taps' sums. Otherwise 8 taps a block, one output at a time. Bytes moved: s (d + in) and
// the partials twice, s = item size.
#include <algorithm>

#include "conv/cuda/common.h"

namespace fusednn::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kBlocks = 4;    // of a multiprocessor: 128 registers; left to itself ptxas spills for more
constexpr int kOutputs = 4;   // of a thread at a time
constexpr int kTapGroup = 8;  // of a block, kernels of any size

struct GradWeightTiling {
  int lanes;           // of channels: a power of two up to 32
  int channel_blocks;  // blockIdx.x = split * channel_blocks + channel block
  int rows, rows_per_split;
  int strips_x;  // of kOutputs, or of one
};

// Sums over the block's positions; `write(row, channel of the block, sum)` gets each. Thread = position *
// lanes + lane. Warps share the rows of sums between them, so that few are left to add by shuffles.
template <class A, int N, int V, class Write>
__device__ void block_sums(const A (&sums)[N][V], int lanes, Write&& write) {
  A* shared = dynamic_shared<A>();  // [N V, kThreads]
#pragma unroll
  for (int i = 0; i < N * V; ++i) shared[i * kThreads + threadIdx.x] = sums[i / V][i % V];
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = warp; i < N * V; i += kWarps) {
    A sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared[i * kThreads + w * 32 + lane];
    for (int step = 16; step >= lanes; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane < lanes) write(i / V, lane * V + i % V, sum);
  }
}

struct Position {
  int64_t image;
  int y, x;
};

// Where a block works.
struct Share {
  int split, first_row;
  int64_t first_channel;
  unsigned strips;

  __device__ Share(const GradWeightTiling& t, int channels_of_block) {
    const auto [s, block] = divide(blockIdx.x, t.channel_blocks);
    split = static_cast<int>(s);
    first_channel = static_cast<int64_t>(block) * channels_of_block;
    first_row = split * t.rows_per_split;
    const int rows = min(t.rows_per_split, t.rows - first_row);
    strips = rows > 0 ? static_cast<unsigned>(rows) * static_cast<unsigned>(t.strips_x) : 0;
  }

  __device__ Position at(unsigned strip, const GradWeightTiling& t, int out_height) const {
    const auto [row, strip_x] = divide(strip, t.strips_x);
    const auto [image, y] = divide(static_cast<unsigned>(first_row) + row, out_height);
    return {static_cast<int64_t>(image), y, strip_x};
  }
};

// Channels of a pack: as many as registers allow to hold K K sums of.
template <int K, bool Last>
constexpr int channels_of_pack = !Last ? 1 : (K == 3 ? 4 : (K == 5 ? 2 : 1));

template <class T, int K, int S, bool Last>
__global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_grad_weight_kernel(DepthwiseGradWeight p, GradWeightTiling tiling) {
  using A = Arithmetic<T>;
  constexpr int V = channels_of_pack<K, Last>;
  const DepthwiseShape& s = p.shape;
  const int lane = threadIdx.x % tiling.lanes;
  const Share share(tiling, tiling.lanes * V);
  const int64_t c = share.first_channel + lane * V, in_channels = s.channels / s.multiplier;
  const int64_t in_c = static_cast<unsigned>(c) / static_cast<unsigned>(s.multiplier);
  const int64_t in_column = Last ? in_channels : 1, out_column = Last ? s.channels : 1;
  A sums[K * K + 1][V] = {};

  const unsigned step = kThreads / tiling.lanes;
  const unsigned end = c < s.channels ? share.strips : 0;
  for (unsigned strip = threadIdx.x / tiling.lanes; strip < end; strip += step) {
    const Position at = share.at(strip, tiling, s.out_height);
    const int x0 = at.x * kOutputs;
    const int64_t out_plane = Last ? at.image * s.out_height : (at.image * s.channels + c) * s.out_height;
    const int64_t out_row = (out_plane + at.y) * s.out_width * out_column + (Last ? c : 0);
    Pack<T, V> d[kOutputs];
#pragma unroll
    for (int t = 0; t < kOutputs; ++t) {
      const bool here = x0 + t < s.out_width;
      d[t] = load_or_zero<T, V>(here ? p.grad_z : nullptr, out_row + (x0 + t) * out_column);
#pragma unroll
      for (int j = 0; j < V; ++j) sums[K * K][j] += d[t].get(j);
    }
    const int64_t in_plane = Last ? at.image * s.height : (at.image * in_channels + in_c) * s.height;
#pragma unroll
    for (int u = 0; u < K; ++u) {
      const int in_y = at.y * S - s.pad_top + u;
      if (!inside(in_y, s.height)) continue;
      const int64_t in_row = (in_plane + in_y) * s.width * in_column + (Last ? in_c : 0);
#pragma unroll
      for (int i = 0; i < (kOutputs - 1) * S + K; ++i) {
        const int in_x = x0 * S - s.pad_left + i;
        if (!inside(in_x, s.width)) continue;
        const Pack<T, V> in = load<T, V>(p.input, in_row + in_x * in_column);
#pragma unroll
        for (int t = 0; t < kOutputs; ++t) {
          const int v = i - t * S;
          if (v < 0 || v >= K || x0 + t >= s.out_width) continue;
#pragma unroll
          for (int j = 0; j < V; ++j) sums[u * K + v][j] += d[t].get(j) * in.get(j);
        }
      }
    }
  }

  block_sums(sums, tiling.lanes, [&](int tap, int channel, A sum) {
    const int64_t c_out = share.first_channel + channel;
    if (c_out >= s.channels) return;
    static_cast<A*>(
        p.partials)[(static_cast<int64_t>(share.split) * (K * K + 1) + tap) * s.channels + c_out] = sum;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_grad_weight_any_kernel(DepthwiseGradWeight p, GradWeightTiling tiling) {
  using A = Arithmetic<T>;
  const DepthwiseShape& s = p.shape;
  const ImageStrides in(s.channels / s.multiplier, s.height, s.width, s.channels_last);
  const ImageStrides out(s.channels, s.out_height, s.out_width, s.channels_last);
  const int taps = s.kernel_h * s.kernel_w, first_tap = static_cast<int>(blockIdx.y) * kTapGroup;
  const int lane = threadIdx.x % tiling.lanes;
  const Share share(tiling, tiling.lanes);
  const int64_t c = share.first_channel + lane;
  const int64_t in_c = static_cast<unsigned>(c) / static_cast<unsigned>(s.multiplier);
  int tap_y[kTapGroup], tap_x[kTapGroup];
#pragma unroll
  for (int i = 0; i < kTapGroup; ++i) {
    tap_y[i] = (first_tap + i) / s.kernel_w * s.dilation_h - s.pad_top;
    tap_x[i] = (first_tap + i) % s.kernel_w * s.dilation_w - s.pad_left;
  }
  A sums[kTapGroup + 1][1] = {};

  const unsigned step = kThreads / tiling.lanes;
  const unsigned end = c < s.channels ? share.strips : 0;
  for (unsigned strip = threadIdx.x / tiling.lanes; strip < end; strip += step) {
    const Position at = share.at(strip, tiling, s.out_height);
    const int64_t place = out.offset(at.image, static_cast<int>(c), at.y, at.x);
    const A d = widen(static_cast<const T*>(p.grad_z)[place]);
    sums[kTapGroup][0] += d;
#pragma unroll
    for (int i = 0; i < kTapGroup; ++i) {
      const int in_y = at.y * s.stride_h + tap_y[i], in_x = at.x * s.stride_w + tap_x[i];
      if (first_tap + i >= taps || !inside(in_y, s.height) || !inside(in_x, s.width)) continue;
      const int64_t from = in.offset(at.image, static_cast<int>(in_c), in_y, in_x);
      sums[i][0] += d * widen(static_cast<const T*>(p.input)[from]);
    }
  }

  block_sums(sums, tiling.lanes, [&](int i, int channel, A sum) {
    const int64_t c_out = share.first_channel + channel;
    const bool is_bias = i == kTapGroup;
    const int tap = is_bias ? taps : first_tap + i;
    if (c_out >= s.channels || (is_bias ? first_tap != 0 : tap >= taps)) return;
    static_cast<A*>(p.partials)[(static_cast<int64_t>(share.split) * (taps + 1) + tap) * s.channels + c_out] =
        sum;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_add_splits_kernel(DepthwiseGradWeight p, int64_t sums) {
  using A = Arithmetic<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= sums) return;
  const int taps = p.shape.kernel_h * p.shape.kernel_w;
  A sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += static_cast<const A*>(p.partials)[split * sums + i];
  const auto [tap, c] = divide(i, static_cast<int>(p.shape.channels));
  T* to = static_cast<T*>(tap == taps ? p.grad_bias : p.grad_weight);
  if (to != nullptr) to[tap == taps ? c : static_cast<int64_t>(c) * taps + tap] = narrow<T>(sum);
}

int most_splits(const DepthwiseShape& s) {
  constexpr int64_t wanted_blocks = 2048, most = 512;
  const int64_t channel_blocks = s.channels_last ? ceil_div(s.channels, 64) : s.channels;
  return static_cast<int>(std::min(std::max<int64_t>(wanted_blocks / channel_blocks, 1), most));
}

// A split takes enough rows to give each thread several strips.
int rows_per_split(const DepthwiseShape& s) {
  const int64_t rows = s.batch * s.out_height;
  const int64_t strips_x = ceil_div(s.out_width, kOutputs);
  const int64_t few = ceil_div(s.channels_last ? 32 : 512, strips_x);
  return static_cast<int>(std::min(rows, std::max(ceil_div(rows, most_splits(s)), few)));
}

GradWeightTiling tiling_of(const DepthwiseShape& s, int channels_of_lane, int outputs) {
  GradWeightTiling t;
  t.lanes = 1;
  const int64_t packs = ceil_div(s.channels, channels_of_lane);
  while (s.channels_last && t.lanes < 32 && t.lanes < packs) t.lanes *= 2;
  t.channel_blocks = static_cast<int>(ceil_div(packs, t.lanes));
  t.rows = static_cast<int>(s.batch * s.out_height);
  t.rows_per_split = rows_per_split(s);
  t.strips_x = ceil_div(s.out_width, outputs);
  return t;
}

unsigned blocks_of(const DepthwiseGradWeight& p, const GradWeightTiling& t) {
  return static_cast<unsigned>(p.splits) * static_cast<unsigned>(t.channel_blocks);
}

template <class T>
cudaError_t launch_any(const DepthwiseGradWeight& p, cudaStream_t stream) {
  const GradWeightTiling tiling = tiling_of(p.shape, 1, 1);
  const int groups = ceil_div(p.shape.kernel_h * p.shape.kernel_w, kTapGroup);
  const size_t shared = sizeof(Arithmetic<T>) * kThreads * (kTapGroup + 1);
  return launch(depthwise_grad_weight_any_kernel<T>, dim3(blocks_of(p, tiling), groups), dim3(kThreads),
                shared, stream, p, tiling);
}

template <class T, int K, int S, bool Last>
cudaError_t launch_known(const DepthwiseGradWeight& p, cudaStream_t stream) {
  constexpr int V = channels_of_pack<K, Last>;
  const DepthwiseShape& s = p.shape;
  const bool packs = s.multiplier == 1 && s.channels % V == 0 && aligned(V * sizeof(T), p.grad_z, p.input);
  if (V > 1 && !packs) return launch_any<T>(p, stream);
  const GradWeightTiling tiling = tiling_of(s, V, kOutputs);
  const size_t shared = sizeof(Arithmetic<T>) * kThreads * (K * K + 1) * V;
  return launch(depthwise_grad_weight_kernel<T, K, S, Last>, dim3(blocks_of(p, tiling)), dim3(kThreads),
                shared, stream, p, tiling);
}

template <class T>
cudaError_t launch_partials(const DepthwiseGradWeight& p, cudaStream_t stream) {
  const auto any = [&] { return launch_any<T>(p, stream); };
  if constexpr (sizeof(T) > sizeof(float)) {
    return any();
  } else {
    const auto known = [&]<int K, int S>() {
      return p.shape.channels_last ? launch_known<T, K, S, true>(p, stream)
                                   : launch_known<T, K, S, false>(p, stream);
    };
    return by_kernel_size(p.shape, known, any);
  }
}

}  // namespace

int depthwise_grad_weight_splits(const DepthwiseShape& s) {
  const int64_t rows = s.batch * s.out_height;
  return rows == 0 || s.channels == 0 ? 0 : static_cast<int>(ceil_div(rows, rows_per_split(s)));
}

cudaError_t depthwise_grad_weight(const DepthwiseGradWeight& p, cudaStream_t stream) {
  if (p.shape.channels == 0) return cudaSuccess;
  return visit_dtype(p.dtype, [&]<class T>(TypeTag<T>) {
    if (p.splits > 0) {
      const cudaError_t error = launch_partials<T>(p, stream);
      if (error != cudaSuccess) return error;
    }
    const int64_t sums = (static_cast<int64_t>(p.shape.kernel_h) * p.shape.kernel_w + 1) * p.shape.channels;
    return launch(depthwise_add_splits_kernel<T>, dim3(static_cast<unsigned>(ceil_div(sums, kThreads))),
                  dim3(kThreads), 0, stream, p, sums);
  });
}

}  // namespace fusednn::cuda
