// LSTM and GRU cells on CPU tensors, as torch functions; schemas and shapes as in fusednn/rnn/ops.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace fusednn {

using OptionalTensor = std::optional<at::Tensor>;
using SixTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_forward(
    const at::Tensor& input, const at::Tensor& hx, const at::Tensor& cx, const at::Tensor& weight_ih,
    const at::Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
    bool save_gates);

SixTensors lstm_cell_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                              const at::Tensor& input, const at::Tensor& hx, const at::Tensor& cx,
                              const at::Tensor& weight_ih, const at::Tensor& weight_hh, const at::Tensor& c,
                              const at::Tensor& gates, const std::array<bool, 6>& output_mask);

std::tuple<at::Tensor, at::Tensor> gru_cell_forward(const at::Tensor& input, const at::Tensor& hx,
                                                    const at::Tensor& weight_ih, const at::Tensor& weight_hh,
                                                    const OptionalTensor& bias_ih,
                                                    const OptionalTensor& bias_hh, bool save_gates);

SixTensors gru_cell_backward(const at::Tensor& grad_h, const at::Tensor& input, const at::Tensor& hx,
                             const at::Tensor& weight_ih, const at::Tensor& weight_hh,
                             const at::Tensor& gates, const std::array<bool, 6>& output_mask);

// The eager shortcut (rnn_cpu_eager.cpp): the whole cell with its autograd node where nothing but plain CPU
// tensors is involved, so that a small cell costs less than the way through the dispatcher. Nothing is
// returned where any condition fails: the caller then takes the general way, which also words the errors.
std::optional<std::tuple<at::Tensor, at::Tensor>> try_lstm_cell(
    const at::Tensor& input, const at::Tensor& hx, const at::Tensor& cx, const at::Tensor& weight_ih,
    const at::Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh);

std::optional<at::Tensor> try_gru_cell(const at::Tensor& input, const at::Tensor& hx,
                                       const at::Tensor& weight_ih, const at::Tensor& weight_hh,
                                       const OptionalTensor& bias_ih, const OptionalTensor& bias_hh);

}  // namespace fusednn
