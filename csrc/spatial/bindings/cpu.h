// Spatial attention on CPU tensors, as torch functions.
#pragma once

#include <tuple>

#include "spatial/bindings/calls.h"

namespace fusednn {

std::tuple<at::Tensor, at::Tensor> spatial_attention_forward(const calls::SpatialAttentionForward& a);

using SpatialGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
SpatialGradients spatial_attention_backward(const calls::SpatialAttentionBackward& a);

}  // namespace fusednn
