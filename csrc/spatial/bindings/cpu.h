// What the bindings of spatial attention share: its ops; schemas and shapes in fusednn/spatial/ops.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string>
#include <tuple>

#include "core/bindings/tensor_checks.h"

namespace fusednn {

std::tuple<at::Tensor, at::Tensor> spatial_attention_forward(
    const at::Tensor& features, const at::Tensor& weight, const OptionalTensor& hidden_term,
    const OptionalTensor& v, const OptionalTensor& mask, const OptionalTensor& learned_temperature,
    double temperature, const std::string& output);

using SpatialGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

SpatialGradients spatial_attention_backward(const OptionalTensor& grad_attended,
                                            const OptionalTensor& grad_map, const at::Tensor& features,
                                            const at::Tensor& weight, const OptionalTensor& hidden_term,
                                            const OptionalTensor& v, const OptionalTensor& mask,
                                            const OptionalTensor& learned_temperature, double temperature,
                                            const std::string& output, const at::Tensor& map,
                                            const std::array<bool, 5>& output_mask);

}  // namespace fusednn
