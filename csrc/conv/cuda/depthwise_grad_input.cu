// The input gradient of a depthwise convolution, from the gradient d of its result before the activation.
//
//   grad_in[n, c, y, x] = sum_{j < m} sum_{u, v} w[c m + j, u, v] d[n, c m + j, Y, X]
//   Y = (y + p - d u) / s,  X = (x + p - d v) / s
//
// over the taps that divide without remainder. Stride 1 and multiplier 1: a convolution with the flipped
// kernel and padding d (k - 1) - p (depthwise_forward.cu). Otherwise each thread gathers one element, or a pack
// of channels of [N, H, W, C]. Bytes moved: s (grad_in + d) + s |w|, s = item size; taps that overlap come from
// the L1 cache.
#include "conv/cuda/common.h"

namespace fusednn::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 4;  // of a multiprocessor: 128 registers; left to itself ptxas spills for more

// The output that tap `u` makes of input row `y`, or -1.
template <int S>
__device__ __forceinline__ int output_of(int y, int pad, int u, int dilation, int stride, int size) {
  const int scaled = y + pad - u * dilation;
  const int step = S == 0 ? stride : S;
  if (scaled < 0 || scaled % step != 0) return -1;
  const int out = scaled / step;
  return out < size ? out : -1;
}

// S: the stride of both dimensions, 0 for any. V > 1 wants [N, H, W, C] and a multiplier of 1.
template <class T, int V, int S>
__global__ void __launch_bounds__(kThreads, kBlocks)
    depthwise_gather_kernel(DepthwiseGradInput p, int64_t items) {
  using A = Arithmetic<T>;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= items) return;
  const DepthwiseShape& s = p.shape;
  const int channels = static_cast<int>(s.channels / s.multiplier);
  const ImageStrides in(channels, s.height, s.width, s.channels_last);
  const ImageStrides out(s.channels, s.out_height, s.out_width, s.channels_last);
  const auto [image, c, y, x] = image_place<V>(item, channels, s.height, s.width, s.channels_last);
  const int64_t taps = static_cast<int64_t>(s.kernel_h) * s.kernel_w;
  A sum[V] = {};
  for (int u = 0; u < s.kernel_h; ++u) {
    const int out_y = output_of<S>(y, s.pad_top, u, s.dilation_h, s.stride_h, s.out_height);
    if (out_y < 0) continue;
    for (int v = 0; v < s.kernel_w; ++v) {
      const int out_x = output_of<S>(x, s.pad_left, v, s.dilation_w, s.stride_w, s.out_width);
      if (out_x < 0) continue;
      const int64_t place = out.offset(image, 0, out_y, out_x);
      const int64_t tap = static_cast<int64_t>(u) * s.kernel_w + v;
      for (int k = 0; k < s.multiplier; ++k) {
        const int64_t channel = static_cast<int64_t>(c) * s.multiplier + k;
        const Pack<T, V> d = load<T, V>(p.grad_z, place + channel * out.c);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sum[j] += widen(static_cast<const T*>(p.weight)[(channel + j) * taps + tap]) * d.get(j);
        }
      }
    }
  }
  store_values<T>(p.grad_input, in.offset(image, c, y, x), true, V, sum);
}

template <class T, int V>
cudaError_t launch_gather(const DepthwiseGradInput& p, cudaStream_t stream) {
  const DepthwiseShape& s = p.shape;
  const int64_t items = s.batch * (s.channels / s.multiplier / V) * s.height * s.width;
  const bool twos = s.stride_h == 2 && s.stride_w == 2;
  const auto kernel = twos ? depthwise_gather_kernel<T, V, 2> : depthwise_gather_kernel<T, V, 0>;
  return launch(kernel, dim3(static_cast<unsigned>(ceil_div(items, kThreads))), dim3(kThreads), 0, stream, p,
                items);
}

// The gradient as a convolution of its own, whose input is grad_z.
DepthwiseShape flipped(const DepthwiseShape& s) {
  DepthwiseShape f = s;
  f.height = s.out_height, f.width = s.out_width;
  f.out_height = s.height, f.out_width = s.width;
  f.pad_top = s.dilation_h * (s.kernel_h - 1) - s.pad_top;
  f.pad_left = s.dilation_w * (s.kernel_w - 1) - s.pad_left;
  return f;
}

}  // namespace

cudaError_t depthwise_grad_input(const DepthwiseGradInput& p, cudaStream_t stream) {
  const DepthwiseShape& s = p.shape;
  if (s.batch == 0 || s.channels == 0) return cudaSuccess;
  if (s.stride_h == 1 && s.stride_w == 1 && s.multiplier == 1) {
    return depthwise_forward(
        {p.dtype, flipped(s), Activation::none, p.grad_z, p.weight, nullptr, p.grad_input, nullptr, true},
        stream);
  }
  return visit_dtype(p.dtype, [&]<class T>(TypeTag<T>) {
    constexpr int V = sizeof(T) <= sizeof(float) ? kWidestAccess / sizeof(T) : 1;
    const bool packs = s.channels_last && s.multiplier == 1 && s.channels % V == 0 &&
                       aligned(kWidestAccess, p.grad_z, p.grad_input);
    return packs ? launch_gather<T, V>(p, stream) : launch_gather<T, 1>(p, stream);
  });
}

}  // namespace fusednn::cuda
