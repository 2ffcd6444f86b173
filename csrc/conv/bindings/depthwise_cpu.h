// The depthwise convolution as the bindings call it, alone and within a block.
#pragma once

#include "conv/bindings/cpu.h"
#include "core/bindings/cpu_kernel.h"

namespace fusednn {

struct Depthwise {
  cpu::DepthwiseShape shape;
  DType dtype;
  DenseImage input;
  at::Tensor weight;
  OptionalTensor bias;

  Depthwise(const at::Tensor& x, const at::Tensor& w, const OptionalTensor& b,
            const calls::Geometry& geometry);
  at::DimVector out_sizes() const { return {shape.batch, shape.channels, shape.out_height, shape.out_width}; }

  // Either of `output` and `statistics` may be null.
  void run(Activation activation, cpu::Image output, void* statistics) const;
};

struct DepthwiseGradients {
  at::Tensor input, weight, bias;
};

// What the gradient comes in as: an image behind an activation, or blocks behind a norm (or nothing).
struct DepthwiseGradientOf {
  Activation activation = Activation::none;
  cpu::Image grad{nullptr, false};
  const void* blocked_grad = nullptr;
  const void* norm = nullptr;
};

// What is not wanted stays undefined.
DepthwiseGradients depthwise_gradients(const Depthwise& conv, const DepthwiseGradientOf& of, bool want_input,
                                       bool want_weight, bool want_bias);

}  // namespace fusednn
