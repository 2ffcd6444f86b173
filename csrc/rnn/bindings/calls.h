// The arguments of the cells' ops, in the order of their schemas; shapes as in fusednn/rnn/ops.py.
#pragma once

#include "core/bindings/arguments.h"

namespace fusednn::calls {

using at::Tensor;

struct LstmCellForward {
  Tensor input, hx, cx, weight_ih, weight_hh;
  OptionalTensor bias_ih, bias_hh;
  bool save_gates;
  FUSEDNN_ARGUMENTS(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, save_gates)
};

struct LstmCellBackward {
  OptionalTensor grad_h, grad_c;
  Tensor input, hx, cx, weight_ih, weight_hh, c, gates;
  std::array<bool, 6> output_mask;
  FUSEDNN_ARGUMENTS(grad_h, grad_c, input, hx, cx, weight_ih, weight_hh, c, gates, output_mask)
};

struct GruCellForward {
  Tensor input, hx, weight_ih, weight_hh;
  OptionalTensor bias_ih, bias_hh;
  bool save_gates;
  FUSEDNN_ARGUMENTS(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, save_gates)
};

struct GruCellBackward {
  Tensor grad_h, input, hx, weight_ih, weight_hh, gates;
  std::array<bool, 6> output_mask;
  FUSEDNN_ARGUMENTS(grad_h, input, hx, weight_ih, weight_hh, gates, output_mask)
};

// CUDA: the pass over the gates, between torch's products.
struct LstmGatesForward {
  Tensor gates;
  OptionalTensor bias_ih, bias_hh;
  Tensor cx;
  bool save_gates;
  FUSEDNN_ARGUMENTS(gates, bias_ih, bias_hh, cx, save_gates)
};

struct LstmGatesBackward {
  OptionalTensor grad_h, grad_c;
  Tensor gates, cx, c;
  FUSEDNN_ARGUMENTS(grad_h, grad_c, gates, cx, c)
};

struct GruGatesForward {
  Tensor gates_x, gates_h;
  OptionalTensor bias_ih, bias_hh;
  Tensor hx;
  bool save_gates;
  FUSEDNN_ARGUMENTS(gates_x, gates_h, bias_ih, bias_hh, hx, save_gates)
};

struct GruGatesBackward {
  Tensor grad_h, gates, hx;
  FUSEDNN_ARGUMENTS(grad_h, gates, hx)
};

}  // namespace fusednn::calls
