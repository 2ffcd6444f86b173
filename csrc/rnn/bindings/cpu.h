// LSTM and GRU cells on CPU tensors, as torch functions.
#pragma once

#include <tuple>

#include "rnn/bindings/calls.h"

namespace fusednn {

using SixTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_forward(const calls::LstmCellForward& a);
SixTensors lstm_cell_backward(const calls::LstmCellBackward& a);
std::tuple<at::Tensor, at::Tensor> gru_cell_forward(const calls::GruCellForward& a);
SixTensors gru_cell_backward(const calls::GruCellBackward& a);

}  // namespace fusednn
