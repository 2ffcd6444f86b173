// CUDA launchers of the conv family.
//
// Every tensor is dense, of `dtype`, and on the stream's device. N = batch, C = channels of the depthwise
// result, m = multiplier, O = channels of the pointwise result. Images are [N, channels, H, W], stored in
// this order or, `channels_last`, as [N, H, W, channels]; all images of a call alike. Padding may be
// negative, which crops.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/activation.h"
#include "core/dtype.h"

namespace fusednn::cuda {

struct DepthwiseShape {
  int64_t batch, channels;  // channels of the result; the input has channels / multiplier
  int multiplier;
  int height, width;          // of the input
  int out_height, out_width;  // of the result
  int kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  bool channels_last;
};

struct DepthwiseForward {
  DType dtype;
  DepthwiseShape shape;
  Activation activation;
  const void* input;   // [N, C / m, H, W]
  const void* weight;  // [C, 1, kh, kw]
  const void* bias;    // [C] or null
  void* output;  // [N, C, H', W'] act(z), or, with grad_output, grad_output act'(z); z is computed again
  const void* grad_output = nullptr;
  bool flipped = false;  // the kernel is read from its last tap to its first
};

struct DepthwiseGradInput {
  DType dtype;
  DepthwiseShape shape;
  const void* grad_z;  // [N, C, H', W']
  const void* weight;  // [C, 1, kh, kw]
  void* grad_input;    // [N, C / m, H, W]
};

struct DepthwiseGradWeight {
  DType dtype;
  DepthwiseShape shape;
  const void* grad_z;  // [N, C, H', W']
  const void* input;   // [N, C / m, H, W]
  int splits;          // depthwise_grad_weight_splits
  void* partials;      // [splits, kh kw + 1, C] of float, or double for f64
  void* grad_weight;   // [C, 1, kh, kw] or null
  void* grad_bias;     // [C] or null
};

// act2(pointwise(act1(depthwise(input)))) + residual in one pass.
struct SeparableForward {
  DType dtype;
  DepthwiseShape shape;
  int out_channels;  // O
  Activation depthwise_activation, pointwise_activation;
  const void* input;             // [N, C / m, H, W]
  const void* depthwise_weight;  // [C, 1, kh, kw]
  const void* depthwise_bias;    // [C] or null
  const void* pointwise_weight;  // [O, C]
  const void* pointwise_bias;    // [O] or null
  const void* residual;          // [N, O, H', W'] or null
  void* output;                  // [N, O, H', W']
  bool allow_tf32;               // float32 products may be rounded to TF32 on tensor cores
};

// What separable_forward can take; it returns cudaErrorInvalidValue beyond. The depthwise result is never made
// twice, so a block keeps the sums of all O channels, and registers limit O; shared memory limits the taps.
constexpr int kSeparableMostTaps = 49;
constexpr int separable_most_outputs(DType dtype) {
  return dtype == DType::f64 ? 0 : (dtype == DType::f32 ? 256 : 512);
}

cudaError_t separable_forward(const SeparableForward&, cudaStream_t);
cudaError_t depthwise_forward(const DepthwiseForward&, cudaStream_t);
cudaError_t depthwise_grad_input(const DepthwiseGradInput&, cudaStream_t);
cudaError_t depthwise_grad_weight(const DepthwiseGradWeight&, cudaStream_t);
// Into how many sums the positions are split. A function of the shape alone, so that results repeat.
int depthwise_grad_weight_splits(const DepthwiseShape&);

}  // namespace fusednn::cuda
