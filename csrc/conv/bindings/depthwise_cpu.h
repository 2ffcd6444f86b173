// The depthwise convolution as the bindings call it, alone and within a block.
#pragma once

#include <ATen/ATen.h>

#include "conv/bindings/cpu.h"
#include "core/bindings/bindings.h"
#include "core/bindings/scratch.h"
#include "core/bindings/tensor_checks.h"
#include "core/bindings/torch_parallel.h"

namespace fusednn {

inline at::ScalarType wide_dtype(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void* data(const at::Tensor& t) {
  return t.defined() && t.numel() > 0 ? t.mutable_data_ptr() : nullptr;
}
inline const void* const_data(const at::Tensor& t) {
  return t.defined() && t.numel() > 0 ? t.const_data_ptr() : nullptr;
}

inline OptionalTensor dense(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

inline at::Tensor or_empty(bool wanted, const at::Tensor& t, const at::Tensor& like) {
  return wanted ? t : at::empty({0}, like.options());
}

struct Depthwise {
  cpu::DepthwiseShape shape;
  DType dtype;
  DenseImage input;
  at::Tensor weight;
  OptionalTensor bias;

  Depthwise(const at::Tensor& x, const at::Tensor& w, const OptionalTensor& b, const Pair& stride,
            const Padding& padding, const Pair& dilation);
  at::DimVector out_sizes() const { return {shape.batch, shape.channels, shape.out_height, shape.out_width}; }

  // Either of `output` and `statistics` may be null.
  void run(cpu::Activation activation, cpu::Image output, void* statistics) const;
};

struct DepthwiseGradients {
  at::Tensor input, weight, bias;
};

// What the gradient comes in as: an image behind an activation, or blocks behind a norm (or nothing).
struct DepthwiseGradientOf {
  cpu::Activation activation = cpu::Activation::none;
  cpu::Image grad{nullptr, false};
  const void* blocked_grad = nullptr;
  const void* norm = nullptr;
};

// What is not wanted stays undefined.
DepthwiseGradients depthwise_gradients(const Depthwise& conv, const DepthwiseGradientOf& of, bool want_input,
                                       bool want_weight, bool want_bias);

}  // namespace fusednn
