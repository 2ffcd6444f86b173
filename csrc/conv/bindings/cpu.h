// What the bindings of the conv family share.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string>
#include <tuple>

#include "conv/cpu/params.h"
#include "core/bindings/tensor_checks.h"

namespace fusednn {

using Pair = std::array<int64_t, 2>;
using Padding = std::array<int64_t, 4>;  // top, bottom, left, right

cpu::Activation activation_named(const std::string& name, const char* argument);

// Checks input [N, C, H, W] and weight [C m, 1, kh, kw] too.
cpu::DepthwiseShape depthwise_shape(const at::Tensor& input, const at::Tensor& weight, const Pair& stride,
                                    const Padding& padding, const Pair& dilation);

// The memory format of torch's own convolution of `input` with these weights.
at::MemoryFormat conv_format(const at::Tensor& input, at::ArrayRef<at::Tensor> weights);

// A tensor as [N, C, H, W] or [N, H, W, C] without holes: itself where it is, otherwise a copy.
struct DenseImage {
  at::Tensor tensor;
  bool last;

  explicit DenseImage(const at::Tensor& t);
  cpu::Image image() const;
};

// What of a block's inference is settled before its weights are packed.
struct SeparableCall {
  cpu::DepthwiseShape shape;
  int64_t out_channels;
  at::MemoryFormat format;
  cpu::Activation activation1, activation2;
};

// Weights and biases, norms folded, in the layout of the kernels.
at::Tensor pack_separable(const cpu::DepthwiseShape& shape, const at::Tensor& depthwise_weight,
                          const OptionalTensor& depthwise_bias, const at::Tensor& pointwise_weight,
                          const OptionalTensor& pointwise_bias);

at::Tensor run_separable(const SeparableCall& call, const at::Tensor& input, const at::Tensor& packed,
                         const OptionalTensor& residual);

// The ops of the block; schemas and shapes in fusednn/conv/ops.py.
at::Tensor separable_conv2d_forward(const at::Tensor& input, const at::Tensor& depthwise_weight,
                                    const OptionalTensor& depthwise_bias, const at::Tensor& pointwise_weight,
                                    const OptionalTensor& pointwise_bias, const OptionalTensor& residual,
                                    const Pair& stride, const Padding& padding, const Pair& dilation,
                                    const std::string& depthwise_activation,
                                    const std::string& pointwise_activation);

using BlockForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

BlockForward separable_conv2d_train_forward(
    const at::Tensor& input, const at::Tensor& depthwise_weight, const OptionalTensor& depthwise_bias,
    const OptionalTensor& norm1_weight, const OptionalTensor& norm1_bias, const at::Tensor& pointwise_weight,
    const OptionalTensor& pointwise_bias, const OptionalTensor& norm2_weight,
    const OptionalTensor& norm2_bias, const OptionalTensor& residual, const Pair& stride,
    const Padding& padding, const Pair& dilation, double eps1, double eps2,
    const std::string& depthwise_activation, const std::string& pointwise_activation, bool has_norm1,
    bool has_norm2);

using BlockGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                  at::Tensor, at::Tensor, at::Tensor>;

BlockGradients separable_conv2d_train_backward(
    const at::Tensor& grad_out, const at::Tensor& input, const at::Tensor& depthwise_weight,
    const OptionalTensor& depthwise_bias, const OptionalTensor& norm1_weight,
    const OptionalTensor& norm1_bias, const at::Tensor& pointwise_weight,
    const OptionalTensor& pointwise_bias, const OptionalTensor& norm2_weight,
    const OptionalTensor& norm2_bias, const at::Tensor& z2, const at::Tensor& mean1, const at::Tensor& rstd1,
    const at::Tensor& mean2, const at::Tensor& rstd2, const Pair& stride, const Padding& padding,
    const Pair& dilation, const std::string& depthwise_activation, const std::string& pointwise_activation,
    bool has_norm1, bool has_norm2, const std::array<bool, 9>& output_mask);

}  // namespace fusednn
