// The gradients of attend-and-recur that no step waits for: products over all steps, torch's on any device.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <vector>

#include "core/bindings/tensor_checks.h"

namespace fusednn {

constexpr int kAttentionLstmGradients = 12;  // in the order of recurrence.py: features, h0, c0, ...
using AttentionLstmWanted = std::array<bool, kAttentionLstmGradients>;

// B sequences of T steps, F = B T frames; wide but for what says otherwise.
struct AttentionLstmSteps {
  bool flatten;
  at::Tensor features;  // [B, T, C, H, W], as the caller gave it
  at::Tensor frames;    // [F, C, P]
  at::Tensor score_weight, weight_ih;
  OptionalTensor lengths;  // [B]
  at::Tensor h0, hidden;   // [B, H], [B, T, H]
  at::Tensor map;          // [F, 1, P]
  OptionalTensor learned;  // as the caller gave it
  at::Tensor temperature;  // one number
  at::Tensor d_h, d_c;     // of the first state; GRU: no d_c
  at::Tensor d_x, d_r;     // [B, T, J], of the input's and the state's product
  at::Tensor d_scaled;     // [B, T, P], of scores / temperature
  at::Tensor d_products;   // [B, T, K, P], of score_weight times the frames
  at::Tensor d_terms;      // [B, T, Q], of hidden_weight times the state
  at::Tensor d_v;          // [any, A], to be summed; additive
  at::Tensor d_attended;   // [B, T, C P] if it was made; overwritten
};

// In the features' dtype, that of the temperature in its own; empty where not wanted.
std::vector<at::Tensor> attention_lstm_gradients(const AttentionLstmSteps& s,
                                                 const AttentionLstmWanted& wanted);

}  // namespace fusednn
