// CPU kernels of the conv family: depthwise convolution, and the depthwise-separable block in one pass. No torch
// here.
//
// N = batch, C = channels of the depthwise result, O = channels of the pointwise result. Images are dense, either
// [N, C, H, W] or [N, H, W, C]. `dtype` is that of images and weights; arithmetic is float, or double for f64.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fusednn/dtype.h"
#include "fusednn/parallel.h"

namespace fusednn::cpu {

enum class Activation : int { none, relu, relu6, silu, hardswish, gelu, gelu_tanh };

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
  // The input has zeros between its pixels: pixel y stands at y * spread. A strided convolution's input gradient
  // is the convolution of such a spread gradient.
  int64_t spread_h = 1, spread_w = 1;
};

// How a call is cut into work, and the memory that takes; what `explain` shows.
struct ConvPlan {
  bool fused;         // strips of depthwise rows go straight into the product; else depthwise first, then product
  int64_t rows;       // of the depthwise result in a strip
  int64_t strips;     // tasks of the (first) parallel region
  int64_t tiles;      // tasks of the product, where it is a region of its own
  int64_t bytes;      // moved to and from memory: input, output and, unfused, the depthwise result twice
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

struct DepthwiseForward {
  DType dtype;
  DepthwiseShape shape;
  Activation activation;
  bool flip;           // the kernel turned by half: an input gradient
  const void* weight;  // [C, kernel_h, kernel_w]
  const void* bias;    // [C] or null
  Image input, output;
  void* workspace;
};

struct ConvKernels {
  ConvPlan (*separable_plan)(DType, const DepthwiseShape&, int64_t out_channels, bool residual, int threads);
  size_t (*packed_bytes)(DType, const DepthwiseShape&, int64_t out_channels);
  // depthwise_weight [C, kernel_h, kernel_w], pointwise_weight [O, C]; biases [C], [O] or null.
  void (*pack_separable)(DType, const DepthwiseShape&, int64_t out_channels, const void* depthwise_weight,
                         const void* depthwise_bias, const void* pointwise_weight, const void* pointwise_bias,
                         void* packed);
  void (*separable_forward)(const SeparableForward&, const Parallel&);

  size_t (*depthwise_workspace)(const DepthwiseForward&, int threads);
  void (*depthwise_forward)(const DepthwiseForward&, const Parallel&);
};

const ConvKernels& conv_kernels();  // of current_isa()

}  // namespace fusednn::cpu
