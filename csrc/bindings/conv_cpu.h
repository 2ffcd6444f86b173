// What the bindings of the conv family share.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string>

#include "fusednn/conv_cpu.h"

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

}  // namespace fusednn
