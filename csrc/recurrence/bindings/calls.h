// The arguments of attend-and-recur's ops, in the order of their schemas; shapes as in
// fusednn/spatial/ops.py.
#pragma once

#include "spatial/bindings/calls.h"

namespace fusednn::calls {

// What the forward and the backward both take: before the biases of the gates, and after them.
struct RecurrenceTensors {
  Tensor features, h0;
  OptionalTensor c0;
  Tensor score_weight, hidden_weight;
  OptionalTensor hidden_bias, v;
  Temperature temperature;
  Tensor weight_ih, weight_hh;
  FUSEDNN_ARGUMENTS(features, h0, c0, score_weight, hidden_weight, hidden_bias, v, temperature, weight_ih,
                    weight_hh)
};

struct RecurrenceOptions {
  OptionalTensor lengths;
  std::string output, cell, form;
  FUSEDNN_ARGUMENTS(lengths, output, cell, form)
};

struct AttentionLstmForward {
  RecurrenceTensors tensors;
  OptionalTensor bias_ih, bias_hh;
  RecurrenceOptions options;
  bool save;
  FUSEDNN_ARGUMENTS(tensors, bias_ih, bias_hh, options, save)
};

struct AttentionLstmBackward {
  OptionalTensor grad_hidden, grad_maps, grad_h, grad_c;
  RecurrenceTensors tensors;
  RecurrenceOptions options;
  Tensor hidden, maps, gates, cells;
  std::array<bool, 12> output_mask;
  FUSEDNN_ARGUMENTS(grad_hidden, grad_maps, grad_h, grad_c, tensors, options, hidden, maps, gates, cells,
                    output_mask)
};

}  // namespace fusednn::calls
