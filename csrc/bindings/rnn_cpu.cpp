// fusednn._C.cpu: LSTM and GRU cells on CPU tensors.
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings/bindings.h"
#include "bindings/rnn_cpu.h"
#include "bindings/tensor_checks.h"
#include "bindings/torch_parallel.h"
#include "bindings/weight_cache.h"
#include "fusednn/cpu_features.h"
#include "fusednn/rnn_cpu.h"

namespace fusednn {
namespace {

using at::Tensor;
using cpu::Cell;
using cpu::Rows;

WeightCache& weight_cache() {
  static WeightCache* const cache = new WeightCache;  // never destroyed: tensors must not outlive torch
  return *cache;
}

std::atomic<bool> keep_packed{true};

cpu::Parallel parallel() { return torch_parallel(); }

at::ScalarType product_dtype(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The same values with neighbours in the last dimension next to each other; a view where they are already.
Tensor with_dense_rows(const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous(); }
Tensor as_operand(const Tensor& t) { return with_dense_rows(t.to(product_dtype(t))); }

Rows rows(const Tensor& t) { return {t.const_data_ptr(), t.stride(0)}; }

Tensor workspace(size_t bytes_per_thread, const cpu::Parallel& threads) {
  return at::empty({static_cast<int64_t>(bytes_per_thread) * threads.threads}, at::kByte);
}

struct CellTensors {
  Cell cell;
  Tensor input, state, weight_ih, weight_hh;
  int64_t batch, input_size, hidden, gate_rows;
  bool wide_state;

  CellTensors(Cell which, const Tensor& x, const Tensor& hx, const Tensor& previous, const Tensor& w_ih,
              const Tensor& w_hh)
      : cell(which) {
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
    check(hx, "hx", {batch, hidden}, state_type);
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
            data_or_null(bias_hh),
            nullptr};
  }
};

Tensor packed_weights(const cpu::RnnKernels& kernels, const cpu::CellWeights& weights, const CellTensors& t) {
  if (!kernels.wants_packed(weights, t.batch)) return {};
  const int variant = static_cast<int>(weights.cell) + 2 * static_cast<int>(cpu::current_isa());
  const auto pack = [&] {
    Tensor packed = at::empty({static_cast<int64_t>(kernels.packed_bytes(weights))}, at::kByte);
    kernels.pack_weights(weights, packed.mutable_data_ptr(), parallel());
    return packed;
  };
  return keep_packed ? weight_cache().find_or_pack({t.weight_ih, t.weight_hh}, variant, pack) : pack();
}

struct ForwardResult {
  Tensor h, c, gates;
};

ForwardResult cell_forward(Cell cell, const Tensor& input, const Tensor& hx, const Tensor& previous,
                           const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih_,
                           const OptionalTensor& bias_hh_, bool save_gates) {
  const CellTensors t(cell, input, hx, previous, weight_ih, weight_hh);
  check(bias_ih_, "bias_ih", {t.gate_rows}, input.scalar_type());
  check(bias_hh_, "bias_hh", {t.gate_rows}, input.scalar_type());
  const auto dense = [](const OptionalTensor& b) { return b ? OptionalTensor(b->contiguous()) : b; };
  const OptionalTensor bias_ih = dense(bias_ih_), bias_hh = dense(bias_hh_);
  ForwardResult r;
  r.h = at::empty({t.batch, t.hidden}, previous.options());
  if (cell == Cell::lstm) r.c = at::empty_like(r.h);
  r.gates =
      at::empty(save_gates ? at::IntArrayRef{t.batch, 4 * t.hidden} : at::IntArrayRef{0}, input.options());
  if (t.empty()) return r;

  const cpu::RnnKernels& kernels = cpu::rnn_kernels();
  const cpu::Parallel threads = parallel();
  cpu::CellWeights weights = t.weights(bias_ih, bias_hh);
  const Tensor packed = packed_weights(kernels, weights, t);
  if (packed.defined()) weights.packed = packed.const_data_ptr();
  const Tensor x = as_operand(input), h = as_operand(hx);
  const Tensor scratch = workspace(kernels.forward_workspace(weights), threads);
  kernels.cell_forward({weights, t.batch, t.wide_state, rows(x), rows(h), rows(t.state),
                        r.h.mutable_data_ptr(), cell == Cell::lstm ? r.c.mutable_data_ptr() : nullptr,
                        save_gates ? r.gates.mutable_data_ptr() : nullptr, scratch.mutable_data_ptr()},
                       threads);
  return r;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> lstm_cell_forward(const Tensor& input, const Tensor& hx, const Tensor& cx,
                                                     const Tensor& weight_ih, const Tensor& weight_hh,
                                                     const OptionalTensor& bias_ih,
                                                     const OptionalTensor& bias_hh, bool save_gates) {
  auto r = cell_forward(Cell::lstm, input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, save_gates);
  return {r.h, r.c, r.gates};
}

std::tuple<Tensor, Tensor> gru_cell_forward(const Tensor& input, const Tensor& hx, const Tensor& weight_ih,
                                            const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                            const OptionalTensor& bias_hh, bool save_gates) {
  auto r = cell_forward(Cell::gru, input, hx, hx, weight_ih, weight_hh, bias_ih, bias_hh, save_gates);
  return {r.h, r.gates};
}

namespace {

// a[M, K] b[K, N], or a^T b; `into` is added to and returned where it is defined.
Tensor multiply(const Tensor& a, bool transpose, const Tensor& b, Tensor into = {}) {
  const bool accumulate = into.defined();
  const int64_t M = a.size(transpose ? 1 : 0), K = a.size(transpose ? 0 : 1), N = b.size(1);
  Tensor out = accumulate ? into : at::empty({M, N}, a.options());
  if (out.numel() == 0) return out;
  if (K == 0) return accumulate ? out : out.zero_();
  const cpu::RnnKernels& kernels = cpu::rnn_kernels();
  const cpu::Parallel threads = parallel();
  const int64_t row = a.size(1);
  cpu::Product p{dtype_of(b, "b"),
                 M,
                 N,
                 K,
                 a.const_data_ptr(),
                 transpose ? 1 : row,
                 transpose ? row : 1,
                 rows(b),
                 out.mutable_data_ptr(),
                 accumulate,
                 nullptr};
  const Tensor scratch = workspace(kernels.product_workspace(p), threads);
  p.workspace = scratch.mutable_data_ptr();
  kernels.multiply(p, threads);
  return out;
}

Tensor sum_rows(const Tensor& a) {
  Tensor out = at::empty({a.size(1)}, a.options());
  if (out.numel() > 0)
    cpu::rnn_kernels().sum_rows(a.scalar_type() == at::kDouble, a.size(0), a.size(1), a.const_data_ptr(),
                                out.mutable_data_ptr(), parallel());
  return out;
}

struct GateGradients {
  Tensor gates, gates_h, state;  // gates_h: GRU only, else the same as gates
};

GateGradients gates_backward(const CellTensors& t, const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                             const Tensor& c, const Tensor& gates) {
  const auto state_type = t.state.scalar_type();
  check(grad_h, "grad_h", {t.batch, t.hidden}, state_type);
  check(grad_c, "grad_c", {t.batch, t.hidden}, state_type);
  check(gates, "gates", {t.batch, 4 * t.hidden}, t.input.scalar_type());
  const auto options = t.input.options().dtype(product_dtype(t.input));
  GateGradients d;
  d.gates = at::empty({t.batch, t.gate_rows}, options);
  d.gates_h = t.cell == Cell::gru ? at::empty_like(d.gates) : d.gates;
  d.state = at::empty({t.batch, t.hidden}, options);
  if (t.empty()) return d;
  const Tensor g = gates.contiguous(), c_dense = c.defined() ? c.contiguous() : c;
  const Tensor g_h = grad_h ? with_dense_rows(*grad_h) : Tensor(),
               g_c = grad_c ? with_dense_rows(*grad_c) : Tensor();
  const auto rows_or_null = [](const Tensor& x) { return x.defined() ? rows(x) : Rows{nullptr, 0}; };
  cpu::rnn_kernels().gates_backward(
      {t.cell, dtype_of(t.input, "input"), t.wide_state, t.batch, t.hidden, rows_or_null(g_h),
       rows_or_null(g_c), rows(t.state), c_dense.defined() ? c_dense.const_data_ptr() : nullptr,
       g.const_data_ptr(), d.gates.mutable_data_ptr(), d.gates_h.mutable_data_ptr(),
       d.state.mutable_data_ptr()},
      parallel());
  return d;
}

}  // namespace

SixTensors lstm_cell_backward(const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& input,
                              const Tensor& hx, const Tensor& cx, const Tensor& weight_ih,
                              const Tensor& weight_hh, const Tensor& c, const Tensor& gates,
                              const std::array<bool, 6>& mask) {
  const CellTensors t(Cell::lstm, input, hx, cx, weight_ih, weight_hh);
  check(c, "c", {t.batch, t.hidden}, t.state.scalar_type());
  const GateGradients d = gates_backward(t, grad_h, grad_c, c, gates);
  const auto where = [&](bool needed, auto make, const Tensor& like) {
    return needed ? make().to(like.scalar_type()) : at::empty({0}, like.options());
  };
  return {
      where(
          mask[0], [&] { return multiply(d.gates, false, t.weight_ih); }, input),
      where(
          mask[1], [&] { return multiply(d.gates, false, t.weight_hh); }, hx),
      where(
          mask[2], [&] { return d.state; }, cx),
      where(
          mask[3], [&] { return multiply(d.gates, true, as_operand(input)); }, weight_ih),
      where(
          mask[4], [&] { return multiply(d.gates, true, as_operand(hx)); }, weight_hh),
      where(
          mask[5], [&] { return sum_rows(d.gates); }, weight_ih),
  };
}

SixTensors gru_cell_backward(const Tensor& grad_h, const Tensor& input, const Tensor& hx,
                             const Tensor& weight_ih, const Tensor& weight_hh, const Tensor& gates,
                             const std::array<bool, 6>& mask) {
  const CellTensors t(Cell::gru, input, hx, hx, weight_ih, weight_hh);
  const GateGradients d = gates_backward(t, grad_h, std::nullopt, {}, gates);
  const auto where = [&](bool needed, auto make, const Tensor& like) {
    return needed ? make().to(like.scalar_type()) : at::empty({0}, like.options());
  };
  return {
      where(
          mask[0], [&] { return multiply(d.gates, false, t.weight_ih); }, input),
      where(
          mask[1], [&] { return multiply(d.gates_h, false, t.weight_hh, d.state); }, hx),
      where(
          mask[2], [&] { return multiply(d.gates, true, as_operand(input)); }, weight_ih),
      where(
          mask[3], [&] { return multiply(d.gates_h, true, as_operand(hx)); }, weight_hh),
      where(
          mask[4], [&] { return sum_rows(d.gates); }, weight_ih),
      where(
          mask[5], [&] { return sum_rows(d.gates_h); }, weight_hh),
  };
}

namespace {

Tensor vector_math(const std::string& function, const Tensor& x) {
  const int number = function == "exp" ? 0 : function == "tanh" ? 1 : function == "sigmoid" ? 2 : -1;
  TORCH_CHECK_VALUE(number >= 0, "function: got ", function, ", expected exp, tanh or sigmoid");
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, "x: got ", x.scalar_type(),
              ", expected float32 or float64");
  const Tensor dense = x.contiguous();
  Tensor out = at::empty_like(dense);
  cpu::rnn_kernels().vector_math(number, x.scalar_type() == at::kDouble, x.numel(), dense.const_data_ptr(),
                                 out.mutable_data_ptr());
  return out;
}

}  // namespace

void bind_rnn_cpu(pybind11::module_& m) {
  const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("lstm_cell_forward", &lstm_cell_forward, unlocked);
  m.def("lstm_cell_backward", &lstm_cell_backward, unlocked);
  m.def("gru_cell_forward", &gru_cell_forward, unlocked);
  m.def("gru_cell_backward", &gru_cell_backward, unlocked);
  m.def("vector_math", &vector_math, unlocked);
  m.def("try_lstm_cell", &try_lstm_cell);
  m.def("try_gru_cell", &try_gru_cell);
  m.def("keep_packed_weights", [](bool keep) { keep_packed = keep; });
  m.def("clear_packed_weights", [] { weight_cache().clear(); });
  m.def("packed_weights", [] { return weight_cache().packed_entries(); });
}

}  // namespace fusednn
