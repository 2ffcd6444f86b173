// fusednn._C.cpu: LSTM and GRU cells on CPU tensors.
#include "rnn/bindings/cpu.h"

#include <ATen/ops/empty_like.h>

#include "core/bindings/cpu_kernel.h"
#include "core/bindings/op.h"
#include "rnn/cpu/params.h"

namespace fusednn {
namespace {

using at::Tensor;
using cpu::Cell;
using cpu::Rows;

Tensor as_operand(const Tensor& t) { return with_dense_rows(t.to(wide_dtype(t))); }

Rows rows(const Tensor& t) { return {t.const_data_ptr(), t.stride(0)}; }

struct CellTensors {
  Cell cell;
  Tensor input, state, weight_ih, weight_hh;
  int64_t batch, input_size, hidden, gate_rows;
  bool wide_state;

  // `previous`: the state that the step starts from, cx or hx.
  template <class Call>
  CellTensors(Cell which, const Call& a, const Tensor& previous) : cell(which) {
    const Tensor &x = a.input, &w_ih = a.weight_ih, &w_hh = a.weight_hh;
    TORCH_CHECK(x.dim() == 2, "input: got ", x.dim(), "D, expected 2D");
    TORCH_CHECK(w_hh.dim() == 2, "weight_hh: got ", w_hh.dim(), "D, expected 2D");
    batch = x.size(0);
    input_size = x.size(1);
    hidden = w_hh.size(1);
    gate_rows = cpu::gates_of(cell) * hidden;
    const auto type = x.scalar_type(), state_type = previous.scalar_type();
    dtype_of(x, "input");
    wide_state = state_type != type;
    TORCH_CHECK(!wide_state || (state_type == at::kFloat && type != at::kDouble), "state: got ", state_type,
                " beside input of ", type, ", expected the same or, beside 16 bits, float32");
    check(x, "input", {batch, input_size}, type);
    check(a.hx, "hx", {batch, hidden}, state_type);
    check(previous, "cx", {batch, hidden}, state_type);
    check(w_ih, "weight_ih", {gate_rows, input_size}, type);
    check(w_hh, "weight_hh", {gate_rows, hidden}, type);
    input = x;
    state = with_dense_rows(previous);
    weight_ih = with_dense_rows(w_ih);
    weight_hh = with_dense_rows(w_hh);
  }

  bool empty() const { return batch == 0 || hidden == 0; }

  cpu::CellWeights weights(const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) const {
    return {cell,
            dtype_of(input, "input"),
            input_size,
            hidden,
            rows(weight_ih),
            rows(weight_hh),
            data_or_null(bias_ih),
            data_or_null(bias_hh)};
  }
};

struct ForwardResult {
  Tensor h, c, gates;
};

template <class Call>
ForwardResult cell_forward(Cell cell, const Call& a, const Tensor& previous) {
  const Tensor& input = a.input;
  const CellTensors t(cell, a, previous);
  check(a.bias_ih, "bias_ih", {t.gate_rows}, input.scalar_type());
  check(a.bias_hh, "bias_hh", {t.gate_rows}, input.scalar_type());
  const OptionalTensor bias_ih = dense(a.bias_ih), bias_hh = dense(a.bias_hh);
  ForwardResult r;
  r.h = at::empty({t.batch, t.hidden}, previous.options());
  if (cell == Cell::lstm) r.c = at::empty_like(r.h);
  r.gates =
      at::empty(a.save_gates ? at::IntArrayRef{t.batch, 4 * t.hidden} : at::IntArrayRef{0}, input.options());
  if (t.empty()) return r;

  const auto& kernels = cpu::kernels<cpu::RnnKernels>();
  const cpu::Parallel threads = torch_parallel();
  const cpu::CellWeights weights = t.weights(bias_ih, bias_hh);
  const Tensor x = as_operand(input), h = as_operand(a.hx);
  const Scratch scratch(kernels.forward_workspace(weights) * threads.threads);
  kernels.cell_forward({weights, t.batch, t.wide_state, rows(x), rows(h), rows(t.state),
                        r.h.mutable_data_ptr(), cell == Cell::lstm ? r.c.mutable_data_ptr() : nullptr,
                        a.save_gates ? r.gates.mutable_data_ptr() : nullptr, scratch.data()},
                       threads);
  return r;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lstm_cell_forward(const calls::LstmCellForward& a) {
  const ForwardResult r = cell_forward(Cell::lstm, a, a.cx);
  return {r.h, r.c, r.gates};
}

std::tuple<Tensor, Tensor> gru_cell_forward(const calls::GruCellForward& a) {
  const ForwardResult r = cell_forward(Cell::gru, a, a.hx);
  return {r.h, r.gates};
}

namespace {

// The products and sums of one backward, gathered and then run together.
class Gradients {
 public:
  explicit Gradients(bool wide) { sums_.wide = wide; }

  // The gradients of what `weight` was multiplied with, added to `into` where that is defined, and of the
  // weight itself; undefined where they are not wanted.
  std::pair<Tensor, Tensor> through(const Tensor& weight, const Tensor& operand, const Tensor& grad_gates,
                                    bool wants_operand, bool wants_weight, const Tensor& into = {}) {
    const int64_t B = grad_gates.size(0), R = grad_gates.size(1), N = weight.size(1);
    Tensor grad_operand, grad_weight;
    if (wants_operand) grad_operand = into.defined() ? into : at::empty({B, N}, grad_gates.options());
    if (wants_weight) grad_weight = at::empty({R, N}, grad_gates.options());
    if (B == 0 || R == 0 || N == 0) {
      if (wants_operand && !into.defined()) grad_operand.zero_();
      if (wants_weight) grad_weight.zero_();
    } else if (wants_operand || wants_weight) {
      const int i = sums_.weight_count++;
      if (wants_weight) kept_[i] = as_operand(operand);
      sums_.weights[i] = {dtype_of(weight, "weight"),
                          B,
                          R,
                          N,
                          grad_gates.const_data_ptr(),
                          rows(weight),
                          wants_weight ? rows(kept_[i]) : Rows{nullptr, 0},
                          wants_operand ? grad_operand.mutable_data_ptr() : nullptr,
                          into.defined(),
                          wants_weight ? grad_weight.mutable_data_ptr() : nullptr};
    }
    return {grad_operand, grad_weight};
  }

  Tensor sum_rows(const Tensor& a) {
    Tensor out = at::empty({a.size(1)}, a.options());
    if (out.numel() > 0)
      sums_.row_sums[sums_.row_sum_count++] = {a.size(0), a.size(1), a.const_data_ptr(),
                                               out.mutable_data_ptr()};
    return out;
  }

  void run() {
    if (sums_.weight_count + sums_.row_sum_count == 0) return;
    const auto& kernels = cpu::kernels<cpu::RnnKernels>();
    const cpu::Parallel threads = torch_parallel();
    const Scratch scratch(kernels.gradient_workspace(sums_.wide) * threads.threads);
    sums_.workspace = scratch.data();
    kernels.gradient_sums(sums_, threads);
  }

 private:
  cpu::GradientSums sums_{};
  Tensor kept_[2];  // operands that were converted for this call
};

struct GateGradients {
  Tensor gates, gates_h, state;  // gates_h: GRU only, else the same as gates
};

GateGradients gates_backward(const CellTensors& t, const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                             const Tensor& c, const Tensor& gates) {
  const auto state_type = t.state.scalar_type();
  check(grad_h, "grad_h", {t.batch, t.hidden}, state_type);
  check(grad_c, "grad_c", {t.batch, t.hidden}, state_type);
  check(gates, "gates", {t.batch, 4 * t.hidden}, t.input.scalar_type());
  const auto options = t.input.options().dtype(wide_dtype(t.input));
  GateGradients d;
  d.gates = at::empty({t.batch, t.gate_rows}, options);
  d.gates_h = t.cell == Cell::gru ? at::empty_like(d.gates) : d.gates;
  d.state = at::empty({t.batch, t.hidden}, options);
  if (t.empty()) return d;
  const Tensor g = gates.contiguous(), c_dense = c.defined() ? c.contiguous() : c;
  const Tensor g_h = grad_h ? with_dense_rows(*grad_h) : Tensor(),
               g_c = grad_c ? with_dense_rows(*grad_c) : Tensor();
  const auto rows_or_null = [](const Tensor& x) { return x.defined() ? rows(x) : Rows{nullptr, 0}; };
  cpu::kernels<cpu::RnnKernels>().gates_backward(
      {t.cell, dtype_of(t.input, "input"), t.wide_state, t.batch, t.hidden, rows_or_null(g_h),
       rows_or_null(g_c), rows(t.state), c_dense.defined() ? c_dense.const_data_ptr() : nullptr,
       g.const_data_ptr(), d.gates.mutable_data_ptr(), d.gates_h.mutable_data_ptr(),
       d.state.mutable_data_ptr()},
      torch_parallel());
  return d;
}

// Each gradient in the dtype of what it belongs to; empty where it was left out.
SixTensors as_gradients(const SixTensors& grads, const std::array<Tensor, 6>& of) {
  const auto cast = [&](const Tensor& grad, const Tensor& like) {
    return grad.defined() ? grad.to(like.scalar_type()) : at::empty({0}, like.options());
  };
  const auto& [a, b, c, d, e, f] = grads;
  return {cast(a, of[0]), cast(b, of[1]), cast(c, of[2]), cast(d, of[3]), cast(e, of[4]), cast(f, of[5])};
}

}  // namespace

SixTensors lstm_cell_backward(const calls::LstmCellBackward& a) {
  const CellTensors t(Cell::lstm, a, a.cx);
  check(a.c, "c", {t.batch, t.hidden}, t.state.scalar_type());
  const GateGradients d = gates_backward(t, a.grad_h, a.grad_c, a.c, a.gates);
  Gradients sums(d.gates.scalar_type() == at::kDouble);
  const auto& mask = a.output_mask;
  const auto [grad_input, grad_weight_ih] = sums.through(t.weight_ih, a.input, d.gates, mask[0], mask[3]);
  const auto [grad_hx, grad_weight_hh] = sums.through(t.weight_hh, a.hx, d.gates, mask[1], mask[4]);
  const Tensor grad_bias = mask[5] ? sums.sum_rows(d.gates) : Tensor();
  sums.run();
  return as_gradients(
      {grad_input, grad_hx, mask[2] ? d.state : Tensor(), grad_weight_ih, grad_weight_hh, grad_bias},
      {a.input, a.hx, a.cx, a.weight_ih, a.weight_hh, a.weight_ih});
}

SixTensors gru_cell_backward(const calls::GruCellBackward& a) {
  const CellTensors t(Cell::gru, a, a.hx);
  const GateGradients d = gates_backward(t, a.grad_h, std::nullopt, {}, a.gates);
  Gradients sums(d.gates.scalar_type() == at::kDouble);
  const auto& mask = a.output_mask;
  const auto [grad_input, grad_weight_ih] = sums.through(t.weight_ih, a.input, d.gates, mask[0], mask[2]);
  const auto [grad_hx, grad_weight_hh] =
      sums.through(t.weight_hh, a.hx, d.gates_h, mask[1], mask[3], d.state);
  const Tensor grad_bias_ih = mask[4] ? sums.sum_rows(d.gates) : Tensor(),
               grad_bias_hh = mask[5] ? sums.sum_rows(d.gates_h) : Tensor();
  sums.run();
  return as_gradients({grad_input, grad_hx, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh},
                      {a.input, a.hx, a.weight_ih, a.weight_hh, a.weight_ih, a.weight_hh});
}

FUSEDNN_BINDINGS(cpu) {
  op(m, "lstm_cell_forward", &lstm_cell_forward);
  op(m, "lstm_cell_backward", &lstm_cell_backward);
  op(m, "gru_cell_forward", &gru_cell_forward);
  op(m, "gru_cell_backward", &gru_cell_backward);
}

}  // namespace fusednn
