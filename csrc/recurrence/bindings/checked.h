// A call's tensors, checked for kernels of any device; formulas in fusednn/recurrence/reference.py.
#pragma once

#include <ATen/ops/zeros.h>

#include <utility>

#include "recurrence/bindings/calls.h"
#include "recurrence/bindings/gradients.h"
#include "spatial/bindings/checked.h"

namespace fusednn {

class CheckedRecurrence : public CheckedArguments {
 public:
  int64_t batch, steps, channels, height, width, hidden_size, energies;  // energies: rows of score_weight
  bool lstm, flatten, hoisted, additive;
  at::Tensor score_weight, hidden_weight, weight_ih, weight_hh;  // dense, as all below
  OptionalTensor hidden_bias, v, lengths;

  int64_t positions() const { return height * width; }
  int64_t gate_rows() const { return (lstm ? 4 : 3) * hidden_size; }
  int64_t terms() const { return additive ? energies : positions(); }
  int64_t inputs() const { return flatten ? channels * positions() : channels; }
  at::DimVector map_sizes() const { return {batch, steps, 1, height, width}; }

  at::Tensor widened(const at::Tensor& t) const { return t.to(wide()).contiguous(); }
  OptionalTensor widened(const OptionalTensor& t) const { return t ? OptionalTensor(widened(*t)) : t; }
  // A state of [B, H] that a kernel may write to.
  at::Tensor state(const char* name, const at::Tensor& t) const {
    return dense(name, t, {batch, hidden_size}).to(wide(), false, true);
  }
  // What kernels write; some, of active steps alone.
  at::Tensor made(at::IntArrayRef sizes, at::ScalarType type) const {
    const at::TensorOptions as = options().dtype(type);
    return lengths ? at::zeros(sizes, as) : at::empty(sizes, as);
  }
  at::Tensor made(at::IntArrayRef sizes) const { return made(sizes, wide()); }

  // What the backward's kernel fills, and what the gradients need beside it, but for the frames, the
  // temperature and d_v.
  AttentionLstmSteps backward_steps(const calls::AttentionLstmBackward& a) const {
    const int64_t B = batch, T = steps, H = hidden_size, P = positions();
    const auto gradient = [&](const char* name, const OptionalTensor& grad) {
      return grad ? state(name, *grad) : at::zeros({B, H}, wide_options());
    };
    check("gates", a.gates, {B, T, 4 * H}, wide());
    if (lstm) check("cells", a.cells, {B, T, H}, wide());
    AttentionLstmSteps s{};
    s.flatten = flatten, s.features = a.tensors.features;
    s.score_weight = widened(score_weight), s.weight_ih = widened(weight_ih);
    s.lengths = lengths, s.learned = a.tensors.temperature.learned_temperature;
    s.h0 = widened(dense("h0", a.tensors.h0, {B, H})),
    s.hidden = widened(dense("hidden", a.hidden, {B, T, H}));
    s.map = widened(dense("maps", a.maps, map_sizes())).view({B * T, 1, P});
    s.d_h = gradient("grad_h", a.grad_h), s.d_c = lstm ? gradient("grad_c", a.grad_c) : at::Tensor();
    s.d_x = made({B, T, gate_rows()}), s.d_r = lstm ? s.d_x : made(s.d_x.sizes());
    s.d_scaled = made({B, T, P}), s.d_products = made({B, T, energies, P});
    s.d_terms = additive ? made({B, T, energies}) : s.d_products.view({B, T, P});
    return s;
  }

 protected:
  CheckedRecurrence(const char* op, const calls::RecurrenceTensors& a,
                    const calls::RecurrenceOptions& options)
      : CheckedArguments(op, "features", a.features) {
    const at::Tensor& f = a.features;
    TORCH_CHECK(f.dim() == 5, op, ": features: got ", f.dim(), "D, expected 5D");
    TORCH_CHECK(a.score_weight.dim() == 2 && a.weight_hh.dim() == 2, op, ": score_weight, weight_hh: got ",
                a.score_weight.dim(), "D and ", a.weight_hh.dim(), "D, expected 2D");
    lstm = first_of("cell", options.cell, "lstm", "gru");
    flatten = first_of("output", options.output, "flatten", "sum");
    hoisted = first_of("form", options.form, "hoisted", "direct");
    additive = a.v.has_value();
    batch = f.size(0), steps = f.size(1), channels = f.size(2), height = f.size(3), width = f.size(4);
    hidden_size = a.weight_hh.size(1), energies = a.score_weight.size(0);
    TORCH_CHECK(steps * channels * positions() * hidden_size * energies > 0, op, ": features: got shape ",
                f.sizes(), " with ", hidden_size, " hidden units and ", energies,
                " rows of score_weight, expected nothing empty but the batch");
    score_weight = dense("score_weight", a.score_weight, {additive ? energies : 1, channels});
    hidden_weight = dense("hidden_weight", a.hidden_weight, {terms(), hidden_size});
    hidden_bias = dense("hidden_bias", a.hidden_bias, {terms()});
    v = dense("v", a.v, {1, energies});
    weight_ih = dense("weight_ih", a.weight_ih, {gate_rows(), inputs()});
    weight_hh = dense("weight_hh", a.weight_hh, {gate_rows(), hidden_size});
    check("lengths", options.lengths, {batch}, at::kLong);
    lengths = fusednn::dense(options.lengths);
    TORCH_CHECK(a.c0.has_value() == lstm, op, ": c0: got ", a.c0 ? "a tensor" : "None",
                ", expected one of an LSTM alone");
    check("c0", a.c0, {batch, hidden_size});
    check_temperature(*this, a.temperature);
  }

 private:
  bool first_of(const char* name, const std::string& got, const char* first, const char* second) const {
    TORCH_CHECK_VALUE(got == first || got == second, op(), ": ", name, ": got '", got, "', expected ", first,
                      " or ", second);
    return got == first;
  }
};

}  // namespace fusednn
