// What the bindings of the conv family share.
#pragma once

#include <tuple>

#include "conv/bindings/calls.h"
#include "conv/cpu/params.h"
#include "core/bindings/tensor_checks.h"

namespace fusednn {

// Checks input [N, C, H, W] and weight [C m, 1, kh, kw] too.
cpu::DepthwiseShape depthwise_shape(const at::Tensor& input, const at::Tensor& weight,
                                    const calls::Geometry& geometry);

// The memory format of torch's own convolution of `input` with these weights.
at::MemoryFormat conv_format(const at::Tensor& input, at::ArrayRef<at::Tensor> weights);

// A tensor as [N, C, H, W] or [N, H, W, C] without holes: itself where it is, otherwise a copy.
struct DenseImage {
  at::Tensor tensor;
  bool last;

  explicit DenseImage(const at::Tensor& t);
  cpu::Image image() const;
};

// A depthwise convolution, alone or within a block.
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

// What of a block's inference is settled before its weights are packed.
struct SeparableCall {
  cpu::DepthwiseShape shape;
  int64_t out_channels;
  at::MemoryFormat format;
  Activation activation1, activation2;
};

// Weights and biases, norms folded, in the layout of the kernels.
at::Tensor pack_separable(const cpu::DepthwiseShape& shape, const at::Tensor& depthwise_weight,
                          const OptionalTensor& depthwise_bias, const at::Tensor& pointwise_weight,
                          const OptionalTensor& pointwise_bias);

at::Tensor run_separable(const SeparableCall& call, const at::Tensor& input, const at::Tensor& packed,
                         const OptionalTensor& residual);

using BlockForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
BlockForward separable_conv2d_train_forward(const calls::TrainForward& a);

using BlockGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                  at::Tensor, at::Tensor, at::Tensor>;
BlockGradients separable_conv2d_train_backward(const calls::TrainBackward& a);

}  // namespace fusednn
