// The arguments of spatial attention's ops, in the order of their schemas; shapes as in
// fusednn/spatial/ops.py.
#pragma once

#include "core/bindings/arguments.h"

namespace fusednn::calls {

using at::Tensor;

// A softmax's temperature: the learned one, where there is one.
struct Temperature {
  OptionalTensor learned_temperature;
  double temperature;
  FUSEDNN_ARGUMENTS(learned_temperature, temperature)
};

struct SpatialSoftmaxForward {
  Tensor logits;
  OptionalTensor mask;
  Temperature temperature;
  bool coordinates;
  FUSEDNN_ARGUMENTS(logits, mask, temperature, coordinates)
};

struct SpatialSoftmaxBackward {
  OptionalTensor grad_map, grad_coordinates, mask;
  Temperature temperature;
  Tensor map;
  std::array<bool, 2> output_mask;
  FUSEDNN_ARGUMENTS(grad_map, grad_coordinates, mask, temperature, map, output_mask)
};

struct SpatialAttentionForward {
  Tensor features, weight;
  OptionalTensor hidden_term, v, mask;
  Temperature temperature;
  std::string output;
  FUSEDNN_ARGUMENTS(features, weight, hidden_term, v, mask, temperature, output)
};

struct SpatialAttentionBackward {
  OptionalTensor grad_attended, grad_map;
  SpatialAttentionForward forward;
  Tensor map;
  std::array<bool, 5> output_mask;
  FUSEDNN_ARGUMENTS(grad_attended, grad_map, forward, map, output_mask)
};

}  // namespace fusednn::calls
