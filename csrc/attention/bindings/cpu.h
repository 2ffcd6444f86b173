// What the bindings of attention on the CPU share.
#pragma once

#include <tuple>

#include "attention/bindings/calls.h"

namespace fusednn {

using AttentionResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Self-attention of a layer: query, key and value are parts of `heads`, masked by `key_mask` alone; results
// go where the caller says, the last dimension dense. Without lse it is undefined.
AttentionResult self_attention_forward(const std::array<at::Tensor, 3>& heads, const OptionalTensor& key_mask,
                                       const std::string& weights, const at::Tensor& output, bool with_lse);
void self_attention_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_weights,
                             const std::array<at::Tensor, 3>& heads, const OptionalTensor& key_mask,
                             const std::string& weights, const at::Tensor& output, const at::Tensor& lse,
                             const std::array<at::Tensor, 3>& grads);

at::Tensor projection_forward(const calls::ProjectionForward& a);
std::tuple<at::Tensor, at::Tensor, at::Tensor> projection_backward(const calls::ProjectionBackward& a);

}  // namespace fusednn
