// The depthwise product that the forward, the activation's backward and, flipped, the input gradient share.
#pragma once

#include "conv/cuda/params.h"

namespace fusednn::cuda {

struct DepthwiseProduct {
  DType dtype;
  DepthwiseShape shape;
  Activation activation;
  const void* input;        // [N, C / m, H, W]
  const void* weight;       // [C, 1, kh, kw]
  const void* bias;         // [C] or null
  const void* grad_output;  // null: output = act(z); else output = grad_output act'(z)
  void* output;             // [N, C, H', W']
  bool flipped;             // the kernel is read from its last tap to its first
};

cudaError_t depthwise_product(const DepthwiseProduct&, cudaStream_t);

}  // namespace fusednn::cuda
