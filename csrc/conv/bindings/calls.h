// The arguments of the conv family's ops, in the order of their schemas; shapes as in fusednn/conv/ops.py.
#pragma once

#include "core/activation.h"
#include "core/bindings/arguments.h"

namespace fusednn {

using Pair = std::array<int64_t, 2>;
using Padding = std::array<int64_t, 4>;  // top, bottom, left, right

inline Activation activation_named(const std::string& name, const char* argument) {
  constexpr const char* names[] = {"none", "relu", "relu6", "silu", "hardswish", "gelu", "gelu_tanh"};
  for (int i = 0; i < 7; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  TORCH_CHECK_VALUE(false, argument, ": got '", name,
                    "', expected 'none', 'relu', 'relu6', 'silu', 'hardswish', 'gelu' or 'gelu_tanh'");
}

namespace calls {

using at::Tensor;

struct Geometry {
  Pair stride;
  Padding padding;
  Pair dilation;
  FUSEDNN_ARGUMENTS(stride, padding, dilation)
};

struct Activations {
  std::string depthwise_activation, pointwise_activation;
  Activation depthwise() const { return activation_named(depthwise_activation, "depthwise_activation"); }
  Activation pointwise() const { return activation_named(pointwise_activation, "pointwise_activation"); }
  FUSEDNN_ARGUMENTS(depthwise_activation, pointwise_activation)
};

struct DepthwiseForward {
  Tensor input, weight;
  OptionalTensor bias;
  Geometry geometry;
  std::string activation;
  FUSEDNN_ARGUMENTS(input, weight, bias, geometry, activation)
};

struct DepthwiseBackward {
  Tensor grad_output, input, weight;
  OptionalTensor bias;
  Geometry geometry;
  std::string activation;
  std::array<bool, 3> output_mask;
  FUSEDNN_ARGUMENTS(grad_output, input, weight, bias, geometry, activation, output_mask)
};

struct SeparableForward {
  Tensor input, depthwise_weight;
  OptionalTensor depthwise_bias;
  Tensor pointwise_weight;
  OptionalTensor pointwise_bias, residual;
  Geometry geometry;
  Activations activations;
  FUSEDNN_ARGUMENTS(input, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual,
                    geometry, activations)
};

// A block in training: each product's weight and bias, then its norm's.
struct Block {
  Tensor input, depthwise_weight;
  OptionalTensor depthwise_bias, norm1_weight, norm1_bias;
  Tensor pointwise_weight;
  OptionalTensor pointwise_bias, norm2_weight, norm2_bias;
  FUSEDNN_ARGUMENTS(input, depthwise_weight, depthwise_bias, norm1_weight, norm1_bias, pointwise_weight,
                    pointwise_bias, norm2_weight, norm2_bias)
};

struct TrainOptions {
  Geometry geometry;
  double eps1, eps2;
  Activations activations;
  bool has_norm1, has_norm2;
  FUSEDNN_ARGUMENTS(geometry, eps1, eps2, activations, has_norm1, has_norm2)
};

struct TrainForward {
  Block block;
  OptionalTensor residual;
  TrainOptions options;
  FUSEDNN_ARGUMENTS(block, residual, options)
};

struct TrainBackward {
  Tensor grad_out;
  Block block;
  Tensor z2, mean1, rstd1, mean2, rstd2;
  Geometry geometry;
  Activations activations;
  bool has_norm1, has_norm2;
  std::array<bool, 9> output_mask;
  FUSEDNN_ARGUMENTS(grad_out, block, z2, mean1, rstd1, mean2, rstd2, geometry, activations, has_norm1,
                    has_norm2, output_mask)
};

}  // namespace calls
}  // namespace fusednn
