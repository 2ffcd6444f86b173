// CPU kernels of the conv family: depthwise convolution, and the depthwise-separable block in one pass.
// No torch here.
//
// N = batch, C = channels of the depthwise result, O = channels of the pointwise result. Images are dense,
// either [N, C, H, W] or [N, H, W, C]. `dtype` is that of images and weights.
// Arithmetic is float, or double for f64.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/activation.h"
#include "core/cpu/kernel_table.h"
#include "core/dtype.h"
#include "core/parallel.h"

namespace fusednn::cpu {

using fusednn::Activation;

struct Image {
  void* data;
  bool channels_last;
};

struct DepthwiseShape {
  int64_t batch, channels, multiplier;  // C; the input has C / multiplier channels
  int64_t height, width;                // of the input
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t pad_top, pad_left, dilation_h, dilation_w;
  // The input has zeros between its pixels: pixel y stands at y * spread. A strided convolution's input
  // gradient is the convolution of such a spread gradient.
  int64_t spread_h = 1, spread_w = 1;
};

// How a call is cut into work, and the memory that takes; what `explain` shows.
struct ConvPlan {
  bool fused;    // strips of depthwise rows go straight into the product; else depthwise first, then product
  int64_t rows;  // of the depthwise result in a strip
  int64_t strips;  // tasks of the (first) parallel region
  int64_t tiles;   // tasks of the product, where it is a region of its own
  int64_t bytes;   // moved to and from memory: input, output and, unfused, the depthwise result twice
  int64_t bytes_unfused;
  int64_t thread_bytes, shared_bytes;  // workspace
};

struct SeparableForward {
  DType dtype;
  DepthwiseShape shape;
  int64_t out_channels;
  Activation depthwise_activation, pointwise_activation;
  const void* packed;  // pack_separable
  Image input;         // [N, C / multiplier, H, W]
  Image residual;      // [N, O, H', W'] in the output's layout, or null
  Image output;        // [N, O, H', W']
  ConvPlan plan;
  void* workspace;  // plan.thread_bytes for each thread, then plan.shared_bytes
};

// Vectors over channels that kernels exchange hold `padded_channels` elements, of float or, for f64, double.
constexpr int64_t padded_channels(int64_t channels) { return (channels + 15) / 16 * 16; }

struct DepthwiseForward {
  DType dtype;
  DepthwiseShape shape;
  Activation activation;
  const void* weight;  // [C, kernel_h, kernel_w]
  const void* bias;    // [C] or null
  Image input;
  Image output;      // null: for the statistics alone
  void* statistics;  // [strips, 2, padded C] mean and squared deviations of each strip's output, or null
  void* workspace;   // depthwise_workspace() bytes
};

// The gradients of act(depthwise convolution) or, with `norm`, of the convolution from da, the gradient
// behind a norm: dz = k1 da - k0 - (z - mean) k2. z is made again from the input.
struct DepthwiseBackward {
  DType dtype;
  DepthwiseShape shape;  // the forward's
  Activation activation;
  Image grad;                // [N, C, H', W'], or null
  const void* blocked_grad;  // instead of it, [N, C / w, H' W', w] float or double, without activation
  const void* norm;          // [4, padded C] k0, k1, k2, mean, or null
  Image input;
  const void* weight;  // [C, kernel_h, kernel_w]
  const void* bias;    // [C] or null
  Image grad_input;    // [N, C, H, W] (of each output channel, where the multiplier is not 1), or null
  void* grad_weight;   // [C, kernel_h, kernel_w] float or double, or null
  void* grad_bias;     // [C] float or double, or null, beside grad_weight
  void* workspace;
};

// A norm as the kernels apply it: (z - mean) scale + shift, [3, padded C].
struct Statistics {
  DType dtype;
  int64_t channels, strips, count;  // values per channel in all
  const int64_t* strip_counts;      // [strips] values per channel in each
  const void* strip_statistics;     // [strips, 2, padded C], or null: no norm
  double eps;
  const void *weight, *bias;  // [C] float or double, or null
  void *mean, *rstd;          // [C] float or double
  void* norm;                 // [3, padded C]
};

// z2 = act1(norm1(z1)) W^T + bias, with statistics; z1 is made of the input, strip by strip.
struct PointwiseForward {
  DType dtype;
  DepthwiseShape shape;
  int64_t out_channels;
  Activation activation;
  Image input;
  const void *depthwise_weight, *depthwise_bias;
  const void* norm;    // [3, padded C]
  const void* weight;  // [O, C]
  const void* bias;    // [O] or null
  void* z2;            // [N, H' W', O]
  void* statistics;    // [train_strips, 2, padded O] or null
  void* workspace;
};

struct NormActivation {  // out = act(norm(z)) + residual
  DType dtype;
  int64_t batch, area, channels;
  Activation activation;
  const void* z;     // [N, H' W', C]
  const void* norm;  // [3, padded C]
  Image residual, output;
  void* workspace;
};

// Sums over pixels of da = grad act'(norm(z)) and of da (z - mean), per strip.
struct NormSums {
  DType dtype;
  DepthwiseShape shape;
  int64_t channels;
  Activation activation;
  Image grad;
  const void* z;
  const void* norm;
  void* sums;  // [train_strips, 2, padded channels]
  void* workspace;
};

// Adds strips' sums up; the norm's own gradients and the coefficients of dz = k1 da - k0 - (z - mean) k2.
struct NormCoefficients {
  DType dtype;
  int64_t channels, strips, count;
  const void* sums;               // [strips, 2, padded C]
  const void *mean, *rstd;        // [C] float or double, or null: no norm
  const void* weight;             // [C] float or double, or null
  void *grad_weight, *grad_bias;  // [C] float or double
  void* coefficients;             // [4, padded C] k0, k1, k2, mean
};

struct PointwiseBackward {
  DType dtype;
  DepthwiseShape shape;
  int64_t out_channels;
  Activation activation1, activation2;
  Image grad;  // [N, O, H', W'] of the block's output
  Image input;
  const void *depthwise_weight, *depthwise_bias;
  const void* z2;
  const void *norm1, *norm2;      // [3, padded]
  const void* coefficients2;      // [4, padded O], or null: no norm
  const void* weight;             // [O, C]
  void* da1;                      // [N, C / w, H' W', w] float or double: padded_channels(C) at most
  void* sums1;                    // [train_strips, 2, padded C] of da1 and da1 (z1 - mean)
  void *grad_weight, *grad_bias;  // [O, C], [O] float or double
  void* workspace;
};

struct ConvKernels {
  ConvPlan (*separable_plan)(DType, const DepthwiseShape&, int64_t out_channels, bool residual, int threads);
  size_t (*packed_bytes)(DType, const DepthwiseShape&, int64_t out_channels);
  // depthwise_weight [C, kernel_h, kernel_w], pointwise_weight [O, C]; biases [C], [O] or null.
  void (*pack_separable)(DType, const DepthwiseShape&, int64_t out_channels, const void* depthwise_weight,
                         const void* depthwise_bias, const void* pointwise_weight, const void* pointwise_bias,
                         void* packed, const Parallel&);
  void (*separable_forward)(const SeparableForward&, const Parallel&);

  int64_t (*depthwise_strips)(const DepthwiseShape&, int64_t* counts);  // counts: [strips] or null
  size_t (*depthwise_workspace)(const DepthwiseForward&, int threads);
  void (*depthwise_forward)(const DepthwiseForward&, const Parallel&);
  size_t (*depthwise_backward_workspace)(const DepthwiseBackward&, int threads);
  void (*depthwise_backward)(const DepthwiseBackward&, const Parallel&);

  int64_t (*train_strips)(const DepthwiseShape&, int64_t* counts);  // likewise
  void (*merge_statistics)(const Statistics&, const Parallel&);
  size_t (*pointwise_forward_workspace)(const PointwiseForward&, int threads);
  void (*pointwise_forward)(const PointwiseForward&, const Parallel&);
  size_t (*norm_activation_workspace)(const NormActivation&, int threads);
  void (*norm_activation)(const NormActivation&, const Parallel&);
  size_t (*norm_sums_workspace)(const NormSums&, int threads);
  void (*norm_sums)(const NormSums&, const Parallel&);
  void (*norm_coefficients)(const NormCoefficients&, const Parallel&);
  size_t (*pointwise_backward_workspace)(const PointwiseBackward&, int threads);
  void (*pointwise_backward)(const PointwiseBackward&, const Parallel&);
};

}  // namespace fusednn::cpu
