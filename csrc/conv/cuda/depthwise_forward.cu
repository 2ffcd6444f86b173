// Depthwise convolution.
//
//   z[n, c, y, x] = b[c] + sum_{u, v} w[c, u, v] in[n, c / m, s y + d u - p, s x + d v - p]     out = act(z)
//
// With a gradient of out given, the result is that of z: grad act'(z).
//
// Three tilings; in each, a thread reads an element of a row once for all the outputs that it makes of it:
//   rows     [N, C, H, W], kernel 3, 5, 7, stride 1, 2: a thread slides down 4 columns of one plane, holds the
//            weights in registers, and the sums of the output rows that the current input row reaches; each
//            input row is read once, one ahead. Where the padding is that of "same" and widths are multiples
//            of 4, rows are read in packs of 4.
//   columns  [N, H, W, C], the same kernels: a thread makes 4 (stride 2: 2) neighbouring outputs of the
//            channels that 16 bytes hold. The block's weights lie in shared memory, [taps, channels].
//   any      one output, or one pack of channels, a thread; any kernel, stride, dilation, multiplier, float64.
// Rows shared by threads one above the other come from the L1 cache. Activations are chosen at run time by
// a branch that all threads share, in one place of each kernel: a choice at compile time makes 14 of each.
// Bytes moved: s (in + out) + s |w|, plus s out if a gradient is given; s = item size.
// Limits: dense images; a dimension, a padding and a reach of the kernel fit in 31 bits. `rows` and `columns`
// count their tiles with 32 bits; larger problems, of some 2^33 elements at least, are for `any`.
#include <algorithm>

#include "conv/cuda/common.h"

namespace fusednn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 4;  // of a multiprocessor: 128 registers; left to itself ptxas spills for more
constexpr int64_t kMostTiles = int64_t{1} << 31;  // leaves room for a block that is not full
constexpr int kTile = 4;                          // outputs along x, in `rows`
constexpr int kFewRows = 4, kMostRows = 16;       // outputs along y, in `rows`
constexpr int64_t kWantedThreads = 65536;

// Stores N neighbours, the first `count` of them where they are no aligned pack.
template <class T, int N>
__device__ __forceinline__ void finish(const DepthwiseForward& p, int64_t offset, Arithmetic<T> (&z)[N],
                                       bool packed = true, int count = N) {
  if (p.grad_output == nullptr) {
    activate(p.activation, z);
  } else {
    Arithmetic<T> grad[N];
    load_values<T>(p.grad_output, offset, packed, count, grad);
    activate_backward(p.activation, grad, z);
  }
  store_values<T>(p.output, offset, packed, count, z);
}

struct RowsTiling {
  unsigned tiles;
  int tiles_x, tiles_y;
  int rows;  // outputs of a thread along y
  bool packed_input, packed_output;
};

// The part of an input row that kTile outputs need.
template <class T, int K, int S>
struct Window {
  static constexpr int size = (kTile - 1) * S + K;
  T at[size];

  // `x` is the column of at[0]. Packs begin at a multiple of kTile, K / 2 being the padding.
  __device__ __forceinline__ void load_row(const T* row, int x, int width, bool present, bool packed) {
    if (packed) {
      constexpr int shift = kTile - K / 2;
#pragma unroll
      for (int i = 0; i < size + shift; i += kTile) {
        const int from = x - shift + i;
        const bool here = present && inside(from, width);
        const Pack<T, kTile> pack = load_or_zero<T, kTile>(here ? row : nullptr, from);
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
          if (i + j >= shift && i + j - shift < size) at[i + j - shift] = pack.items[j];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < size; ++i) at[i] = present && inside(x + i, width) ? row[x + i] : narrow<T>(0);
    }
  }
};

template <class T, int K, int S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_rows_kernel(DepthwiseForward p, RowsTiling tiling) {
  using A = Arithmetic<T>;
  const unsigned tile = blockIdx.x * kThreads + threadIdx.x;
  if (tile >= tiling.tiles) return;
  const DepthwiseShape& s = p.shape;
  const auto [rest, tile_x] = divide(tile, tiling.tiles_x);
  const auto [plane_index, tile_y] = divide(rest, tiling.tiles_y);  // n C + c
  const int c = divide(plane_index, static_cast<int>(s.channels)).remainder;
  const int64_t input_plane = divide(plane_index, s.multiplier).quotient;
  const int x0 = tile_x * kTile, y0 = tile_y * tiling.rows;
  const int first_x = x0 * S - s.pad_left, first_y = y0 * S - s.pad_top;
  const T* input = static_cast<const T*>(p.input) + input_plane * s.height * s.width;
  const auto load_row = [&](Window<T, K, S>& window, int y, bool needed) {
    window.load_row(input + static_cast<int64_t>(y) * s.width, first_x, s.width,
                    needed && inside(y, s.height), tiling.packed_input);
  };

  A weight[K * K];
#pragma unroll
  for (int i = 0; i < K * K; ++i) {
    weight[i] = widen(
        static_cast<const T*>(p.weight)[static_cast<int64_t>(c) * (K * K) + (p.flipped ? K * K - 1 - i : i)]);
  }
  const A bias = p.bias != nullptr ? widen(static_cast<const T*>(p.bias)[c]) : A(0);
  // In step i, S input rows reach the output rows i, i - 1, ... i - slots + 1 of the tile.
  constexpr int slots = (K + S - 1) / S;
  A z[slots][kTile];
#pragma unroll
  for (int i = 0; i < slots * kTile; ++i) z[i / kTile][i % kTile] = bias;

  int64_t output = (static_cast<int64_t>(plane_index) * s.out_height + y0) * s.out_width + x0;
  const int rows = min(tiling.rows, s.out_height - y0);
  const int last_row = (rows - 1) * S + K - 1;  // of the input, from first_y on
  Window<T, K, S> window, next;
  load_row(window, first_y, true);
#pragma unroll 1
  for (int i = 0; i < rows + slots - 1; ++i) {
#pragma unroll
    for (int r = 0; r < S; ++r) {
      const int row = i * S + r;
      load_row(next, first_y + row + 1, row < last_row);
#pragma unroll
      for (int j = 0; j < slots; ++j) {
        const int u = j * S + r;
        if (u >= K || i < j || i - j >= rows) continue;
#pragma unroll
        for (int v = 0; v < K; ++v) {
#pragma unroll
          for (int t = 0; t < kTile; ++t) z[j][t] += weight[u * K + v] * widen(window.at[t * S + v]);
        }
      }
      window = next;
    }
    if (i >= slots - 1) {
      finish<T>(p, output, z[slots - 1], tiling.packed_output, s.out_width - x0);
      output += s.out_width;
    }
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
#pragma unroll
      for (int j = slots - 1; j > 0; --j) z[j][t] = z[j - 1][t];
      z[0][t] = bias;
    }
  }
}

struct ColumnsTiling {
  unsigned strips;  // N H' ceil(W' / outputs)
  int strips_x, repeats;
  int packs;  // of channels
};

template <int S>
constexpr int columns_outputs = S == 1 ? 4 : 2;

template <class T, int K, int S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_columns_kernel(DepthwiseForward p, ColumnsTiling tiling) {
  using A = Arithmetic<T>;
  constexpr int V = kWidestAccess / sizeof(T), outputs = columns_outputs<S>;
  const DepthwiseShape& s = p.shape;
  const int64_t C = s.channels;
  auto* weights = dynamic_shared<Pack<T, V>>();  // [K K, blockDim.x]
  const int first_pack = static_cast<int>(blockIdx.y * blockDim.x);
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < K * K * V * static_cast<int>(blockDim.x);
       i += kThreads) {
    const int channel = i / (K * K), tap = i % (K * K);
    const int64_t c = static_cast<int64_t>(first_pack) * V + channel;
    const int from = p.flipped ? K * K - 1 - tap : tap;
    weights[tap * blockDim.x + channel / V].items[channel % V] =
        c < C ? static_cast<const T*>(p.weight)[c * (K * K) + from] : narrow<T>(0);
  }
  __syncthreads();
  const int pack = first_pack + static_cast<int>(threadIdx.x);
  if (pack >= tiling.packs) return;
  const int64_t c = static_cast<int64_t>(pack) * V;
  const Pack<T, V> bias = load_or_zero<T, V>(p.bias, c);

  unsigned strip = blockIdx.x * blockDim.y * tiling.repeats + threadIdx.y;
  for (int repeat = 0; repeat < tiling.repeats && strip < tiling.strips; ++repeat, strip += blockDim.y) {
    const auto [row_index, strip_x] = divide(strip, tiling.strips_x);  // n H' + y
    const auto [image, y] = divide(row_index, s.out_height);
    const int64_t row = row_index;
    const int x0 = strip_x * outputs;
    A z[outputs][V];
#pragma unroll
    for (int i = 0; i < outputs * V; ++i) z[i / V][i % V] = bias.get(i % V);

#pragma unroll 1
    for (int u = 0; u < K; ++u) {
      const int in_y = y * S - s.pad_top + u;
      if (!inside(in_y, s.height)) continue;
      const int64_t in_row = (static_cast<int64_t>(image) * s.height + in_y) * s.width;
#pragma unroll
      for (int i = 0; i < (outputs - 1) * S + K; ++i) {
        const int in_x = x0 * S - s.pad_left + i;
        if (!inside(in_x, s.width)) continue;
        const Pack<T, V> in = load<T, V>(p.input, (in_row + in_x) * C + c);
#pragma unroll
        for (int t = 0; t < outputs; ++t) {
          const int v = i - t * S;
          if (v < 0 || v >= K) continue;
          const Pack<T, V> weight = weights[(u * K + v) * blockDim.x + threadIdx.x];
#pragma unroll
          for (int j = 0; j < V; ++j) z[t][j] += weight.get(j) * in.get(j);
        }
      }
    }
    // Not unrolled: there would be as many copies of all activations. The next one moves up to z[0].
#pragma unroll 1
    for (int t = 0; t < outputs && x0 + t < s.out_width; ++t) {
      finish<T>(p, (row * s.out_width + x0 + t) * C + c, z[0]);
#pragma unroll
      for (int i = 0; i < (outputs - 1) * V; ++i) z[i / V][i % V] = z[i / V + 1][i % V];
    }
  }
}

// V > 1 wants [N, H, W, C] and a multiplier of 1.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks) depthwise_any_kernel(DepthwiseForward p, int64_t items) {
  using A = Arithmetic<T>;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= items) return;
  const DepthwiseShape& s = p.shape;
  const ImageStrides in(s.channels / s.multiplier, s.height, s.width, s.channels_last);
  const ImageStrides out(s.channels, s.out_height, s.out_width, s.channels_last);
  const auto [image, c, y, x] =
      image_place<V>(item, static_cast<int>(s.channels), s.out_height, s.out_width, s.channels_last);
  const int in_c = c / s.multiplier;
  const int taps = s.kernel_h * s.kernel_w;
  const T* weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(c) * taps;
  const Pack<T, V> bias = load_or_zero<T, V>(p.bias, c);
  A z[V];
#pragma unroll
  for (int j = 0; j < V; ++j) z[j] = bias.get(j);
  for (int u = 0; u < s.kernel_h; ++u) {
    const int in_y = y * s.stride_h - s.pad_top + u * s.dilation_h;
    if (!inside(in_y, s.height)) continue;
    for (int v = 0; v < s.kernel_w; ++v) {
      const int in_x = x * s.stride_w - s.pad_left + v * s.dilation_w;
      if (!inside(in_x, s.width)) continue;
      const Pack<T, V> value = load<T, V>(p.input, in.offset(image, in_c, in_y, in_x));
      const int tap = u * s.kernel_w + v, from = p.flipped ? taps - 1 - tap : tap;
#pragma unroll
      for (int j = 0; j < V; ++j) z[j] += widen(weight[static_cast<int64_t>(j) * taps + from]) * value.get(j);
    }
  }
  finish<T>(p, out.offset(image, c, y, x), z);
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

template <class T, int V>
cudaError_t launch_any(const DepthwiseForward& p, cudaStream_t stream) {
  const DepthwiseShape& s = p.shape;
  const int64_t items = s.batch * (s.channels / V) * s.out_height * s.out_width;
  return launch(depthwise_any_kernel<T, V>, dim3(blocks_for(items)), dim3(kThreads), 0, stream, p, items);
}

template <class T, int K, int S>
cudaError_t launch_rows(const DepthwiseForward& p, cudaStream_t stream) {
  const DepthwiseShape& s = p.shape;
  RowsTiling tiling;
  tiling.tiles_x = ceil_div(s.out_width, kTile);
  const int64_t columns = s.batch * s.channels * tiling.tiles_x;
  int rows = kMostRows;
  while (rows > kFewRows && columns * ceil_div(s.out_height, rows) < kWantedThreads) rows /= 2;
  tiling.tiles_y = ceil_div(s.out_height, rows);
  tiling.rows = ceil_div(s.out_height, tiling.tiles_y);
  const int64_t tiles = columns * tiling.tiles_y;
  if (tiles > kMostTiles) return launch_any<T, 1>(p, stream);
  tiling.tiles = static_cast<unsigned>(tiles);
  constexpr size_t pack_bytes = kTile * sizeof(T);
  tiling.packed_output = s.out_width % kTile == 0 && aligned(pack_bytes, p.output, p.grad_output);
  tiling.packed_input = s.pad_left == K / 2 && s.width % kTile == 0 && aligned(pack_bytes, p.input);
  return launch(depthwise_rows_kernel<T, K, S>, dim3(blocks_for(tiling.tiles)), dim3(kThreads), 0, stream, p,
                tiling);
}

template <class T, int K, int S>
cudaError_t launch_columns(const DepthwiseForward& p, cudaStream_t stream) {
  constexpr int V = kWidestAccess / sizeof(T);
  const DepthwiseShape& s = p.shape;
  ColumnsTiling tiling;
  tiling.packs = static_cast<int>(s.channels / V);
  tiling.strips_x = ceil_div(s.out_width, columns_outputs<S>);
  const int64_t strips = s.batch * s.out_height * tiling.strips_x;
  if (strips > kMostTiles) return launch_any<T, V>(p, stream);
  tiling.strips = static_cast<unsigned>(strips);
  int lanes = 1;
  while (lanes < 32 && lanes < tiling.packs) lanes *= 2;
  const int rows = kThreads / lanes;
  // A block that makes several strips reads its weights once for all of them.
  const int64_t repeats = strips * tiling.packs / kWantedThreads;
  tiling.repeats = static_cast<int>(std::clamp<int64_t>(repeats, 1, 8));
  const int64_t blocks = ceil_div(strips, static_cast<int64_t>(rows) * tiling.repeats);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(tiling.packs, lanes)));
  return launch(depthwise_columns_kernel<T, K, S>, grid, dim3(lanes, rows), K * K * lanes * kWidestAccess,
                stream, p, tiling);
}

template <class T, int K, int S>
cudaError_t launch_known(const DepthwiseForward& p, bool packs, cudaStream_t stream) {
  if (!p.shape.channels_last) return launch_rows<T, K, S>(p, stream);
  return packs ? launch_columns<T, K, S>(p, stream) : launch_any<T, 1>(p, stream);
}

template <class T>
cudaError_t launch_dtype(const DepthwiseForward& p, cudaStream_t stream) {
  constexpr int V = sizeof(T) <= sizeof(float) ? kWidestAccess / sizeof(T) : 1;  // pairs of doubles spill
  const DepthwiseShape& s = p.shape;
  const bool packs = s.channels_last && s.multiplier == 1 && s.channels % V == 0 &&
                     s.channels / V / 32 < 65535 &&
                     aligned(kWidestAccess, p.input, p.output, p.bias, p.grad_output);
  const auto any = [&] { return packs ? launch_any<T, V>(p, stream) : launch_any<T, 1>(p, stream); };
  if constexpr (sizeof(T) > sizeof(float)) {
    return any();
  } else {
    return by_kernel_size(s, [&]<int K, int S>() { return launch_known<T, K, S>(p, packs, stream); }, any);
  }
}

}  // namespace

cudaError_t depthwise_forward(const DepthwiseForward& p, cudaStream_t stream) {
  const DepthwiseShape& s = p.shape;
  if (s.batch == 0 || s.channels == 0 || s.out_height == 0 || s.out_width == 0) return cudaSuccess;
  return visit_dtype(p.dtype, [&]<class T>(TypeTag<T>) { return launch_dtype<T>(p, stream); });
}

}  // namespace fusednn::cuda
