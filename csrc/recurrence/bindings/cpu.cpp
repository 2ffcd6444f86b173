// fusednn._C.cpu: attention inside an LSTM or a GRU, over sequences; schemas as in fusednn/spatial/ops.py.
#include "recurrence/cpu/params.h"

#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <limits>

#include "core/bindings/bindings.h"
#include "core/bindings/scratch.h"
#include "core/bindings/tensor_checks.h"
#include "core/bindings/torch_parallel.h"
#include "core/bindings/weight_cache.h"
#include "core/cpu/features.h"
#include "recurrence/bindings/gradients.h"

namespace fusednn {
namespace {

using at::Tensor;
using cpu::AttentionLstm;
using cpu::Cell;

const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* data(Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

bool choice(const std::string& got, const char* name, const char* first, const char* second) {
  TORCH_CHECK(got == first || got == second, name, ": got ", got, ", expected ", first, " or ", second);
  return got == first;
}

// T for arithmetic: the smallest normal number or more, NaN unless positive.
template <class T>
double temperature_of(const OptionalTensor& learned, double fixed) {
  const double t = learned ? learned->item<double>() : fixed;
  using Limits = std::numeric_limits<T>;
  if (!(t > 0)) return std::numeric_limits<double>::quiet_NaN();
  if (t > Limits::max()) return std::numeric_limits<double>::infinity();
  return std::max(t, static_cast<double>(Limits::min()));
}

// The operands, checked, dense and in the arithmetic's dtype.
struct Operands {
  at::ScalarType storage, wide;
  Tensor features, score_weight, hidden_weight, weight_ih, weight_hh;
  OptionalTensor hidden_bias, v, lengths;
  AttentionLstm q;

  Operands(const Tensor& features_, const OptionalTensor& c0, const Tensor& score_weight_,
           const Tensor& hidden_weight_, const OptionalTensor& hidden_bias_, const OptionalTensor& v_,
           const OptionalTensor& learned, double fixed, const Tensor& weight_ih_, const Tensor& weight_hh_,
           const OptionalTensor& lengths_, const std::string& output, const std::string& cell,
           const std::string& form) {
    TORCH_CHECK(features_.dim() == 5, "features: got ", features_.dim(), "D, expected 5D");
    TORCH_CHECK(score_weight_.dim() == 2, "score_weight: got ", score_weight_.dim(), "D, expected 2D");
    TORCH_CHECK(weight_hh_.dim() == 2, "weight_hh: got ", weight_hh_.dim(), "D, expected 2D");
    const auto type = features_.scalar_type();
    q = {};
    q.cell = choice(cell, "cell", "lstm", "gru") ? Cell::lstm : Cell::gru;
    dtype_of(features_, "features");
    storage = type;
    wide = type == at::kDouble ? at::kDouble : at::kFloat;
    q.dtype = wide == at::kDouble ? DType::f64 : DType::f32;
    q.flatten = choice(output, "output", "flatten", "sum");
    q.hoisted = choice(form, "form", "hoisted", "direct");
    q.additive = v_.has_value();
    q.batch = features_.size(0);
    q.steps = features_.size(1);
    q.channels = features_.size(2);
    q.positions = features_.size(3) * features_.size(4);
    q.hidden_size = weight_hh_.size(1);
    q.energies = score_weight_.size(0);
    q.temperature =
        type == at::kDouble ? temperature_of<double>(learned, fixed) : temperature_of<float>(learned, fixed);
    const int64_t H = q.hidden_size;
    check(features_, "features", features_.sizes(), type);
    check(score_weight_, "score_weight", {q.additive ? q.energies : 1, q.channels}, type);
    check(hidden_weight_, "hidden_weight", {q.terms(), H}, type);
    check(hidden_bias_, "hidden_bias", {q.terms()}, type);
    check(v_, "v", {1, q.energies}, type);
    check(weight_ih_, "weight_ih", {q.gate_rows(), q.inputs()}, type);
    check(weight_hh_, "weight_hh", {q.gate_rows(), H}, type);
    check(lengths_, "lengths", {q.batch}, at::kLong);
    TORCH_CHECK(c0.has_value() == (q.cell == Cell::lstm), "c0: got ", c0 ? "a tensor" : "None",
                ", expected one of an LSTM alone");
    check(c0, "c0", {q.batch, H}, type);
    TORCH_CHECK(q.steps * q.channels * q.positions * q.hidden_size * q.energies > 0, "features: got shape ",
                features_.sizes(), " with ", q.hidden_size, " hidden units and ", q.energies,
                " rows of score_weight, expected nothing empty but the batch");
    features = dense(features_);
    score_weight = dense(score_weight_);
    hidden_weight = dense(hidden_weight_);
    weight_ih = dense(weight_ih_);
    weight_hh = dense(weight_hh_);
    hidden_bias = dense(hidden_bias_);
    v = dense(v_);
    if (lengths_) lengths = lengths_->contiguous();
    q.features = data(features);
    q.score_weight = data(score_weight);
    q.hidden_weight = data(hidden_weight);
    q.hidden_bias = data_or_null(hidden_bias);
    q.v = data_or_null(v);
    q.weight_ih = data(weight_ih);
    q.weight_hh = data(weight_hh);
    q.lengths = lengths ? lengths->const_data_ptr<int64_t>() : nullptr;
  }
  Operands(const Operands&) = delete;

  bool empty() const { return q.batch == 0; }
  Tensor make(at::IntArrayRef sizes) const { return at::empty(sizes, features.options()); }
  Tensor dense(const Tensor& t) const { return t.to(wide).contiguous(); }
  OptionalTensor dense(const OptionalTensor& t) const { return t ? OptionalTensor(dense(*t)) : t; }
  Tensor stored(const Tensor& t) const { return t.defined() ? t.to(storage) : make({0}).to(storage); }
  // A state of [B, H] that a kernel may write to.
  Tensor state(const Tensor& t, const char* name) const {
    check(t, name, {q.batch, q.hidden_size}, storage);
    return t.to(wide, false, true, at::MemoryFormat::Contiguous);
  }
};

// weight_ih as the hoisted product reads it, where it was kept for this weight; undefined where the kernel is
// to copy it as it goes: for other products, and in training, which changes it before it is seen again.
Tensor packed_weight(const AttentionLstm& q, const Tensor& weight_ih, bool save) {
  if (!q.hoisted || !q.flatten || save) return {};
  const int variant = 128 + static_cast<int>(cpu::current_isa());  // beside those of cells and convolutions
  const std::vector<double> constants{static_cast<double>(q.channels), static_cast<double>(q.positions)};
  return WeightCache::instance().find(
      {weight_ih}, variant,
      [&] {
        const cpu::AttentionLstmKernels& kernels = cpu::attention_lstm_kernels();
        const at::ScalarType type = q.dtype == DType::f64 ? at::kDouble : at::kFloat;
        const Tensor packed = at::empty({kernels.packed_elements(q)}, type);
        kernels.pack(q, packed.mutable_data_ptr(), torch_parallel());
        return packed;
      },
      constants);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_lstm_forward(
    const Tensor& features, const Tensor& h0, const OptionalTensor& c0, const Tensor& score_weight,
    const Tensor& hidden_weight, const OptionalTensor& hidden_bias, const OptionalTensor& v,
    const OptionalTensor& learned, double temperature, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias_ih_, const OptionalTensor& bias_hh_, const OptionalTensor& lengths,
    const std::string& output, const std::string& cell, const std::string& form, bool save) {
  const Operands o(features, c0, score_weight, hidden_weight, hidden_bias, v, learned, temperature, weight_ih,
                   weight_hh, lengths, output, cell, form);
  AttentionLstm q = o.q;
  check(bias_ih_, "bias_ih", {q.gate_rows()}, features.scalar_type());
  check(bias_hh_, "bias_hh", {q.gate_rows()}, features.scalar_type());
  const OptionalTensor bias_ih = o.dense(bias_ih_), bias_hh = o.dense(bias_hh_);
  const int64_t B = q.batch, T = q.steps, H = q.hidden_size;
  Tensor h = o.state(h0, "h0"), c = c0 ? o.state(*c0, "c0") : Tensor();
  Tensor hidden = o.make({B, T, H}), maps = o.make({B, T, 1, features.size(3), features.size(4)});
  Tensor gates = save ? o.make({B, T, 4 * H}) : Tensor(), cells = save && c0 ? o.make({B, T, H}) : Tensor();
  if (!o.empty()) {
    const cpu::AttentionLstmKernels& kernels = cpu::attention_lstm_kernels();
    const cpu::Parallel threads = torch_parallel();
    const Tensor packed = packed_weight(q, weight_ih, save);
    if (packed.defined()) q.packed = packed.const_data_ptr();
    const Scratch scratch(kernels.forward_workspace(q, threads.threads));
    kernels.forward({q, data_or_null(bias_ih), data_or_null(bias_hh), data(h), data(c), data(hidden),
                     data(maps), data(gates), data(cells), scratch.data()},
                    threads);
  }
  const auto saved = [&](const Tensor& t) { return t.defined() ? t : o.make({0}); };
  return {o.stored(hidden), o.stored(maps), o.stored(h), o.stored(c), saved(gates), saved(cells)};
}

// What the steps of the backward leave behind.
struct StepGradients {
  Tensor h, c, x, r, scaled, products, terms, v, attended;
};

struct Saved {
  Tensor h0, hidden, maps, gates;
  OptionalTensor c0;
  Tensor cells;
};

StepGradients walk_back(const Operands& o, const Saved& saved, const OptionalTensor& grad_hidden,
                        const OptionalTensor& grad_maps, const OptionalTensor& grad_h,
                        const OptionalTensor& grad_c) {
  const AttentionLstm& q = o.q;
  const int64_t B = q.batch, T = q.steps, H = q.hidden_size, P = q.positions;
  const bool lstm = q.cell == Cell::lstm;
  const auto zeros = [&](at::IntArrayRef sizes) { return at::zeros(sizes, o.features.options()); };
  StepGradients d;
  d.h = grad_h ? o.state(*grad_h, "grad_h") : zeros({B, H});
  if (lstm) d.c = grad_c ? o.state(*grad_c, "grad_c") : zeros({B, H});
  d.x = o.make({B, T, q.gate_rows()});
  d.r = lstm ? d.x : o.make({B, T, q.gate_rows()});
  d.scaled = o.make({B, T, P});
  d.products = o.make({B, T, q.energies, P});
  d.terms = q.additive ? o.make({B, T, q.energies}) : d.products.view({B, T, P});
  if (q.additive) d.v = zeros({B, q.energies});
  if (q.flatten && !q.hoisted) d.attended = o.make({B, T, q.inputs()});
  if (o.empty()) return d;
  const cpu::AttentionLstmKernels& kernels = cpu::attention_lstm_kernels();
  const cpu::Parallel threads = torch_parallel();
  const Scratch scratch(kernels.backward_workspace(q, threads.threads));
  kernels.backward(
      {q, data(saved.h0), data_or_null(saved.c0), data(saved.hidden), data(saved.maps), data(saved.gates),
       lstm ? data(saved.cells) : nullptr, data_or_null(grad_hidden), data_or_null(grad_maps), data(d.h),
       data(d.c), data(d.x), lstm ? nullptr : data(d.r), data(d.scaled), data(d.products),
       q.additive ? data(d.terms) : nullptr, data(d.v), data(d.attended), scratch.data()},
      threads);
  return d;
}

std::vector<Tensor> attention_lstm_backward(
    const OptionalTensor& grad_hidden_, const OptionalTensor& grad_maps_, const OptionalTensor& grad_h,
    const OptionalTensor& grad_c, const Tensor& features, const Tensor& h0, const OptionalTensor& c0,
    const Tensor& score_weight, const Tensor& hidden_weight, const OptionalTensor& hidden_bias,
    const OptionalTensor& v, const OptionalTensor& learned, double temperature, const Tensor& weight_ih,
    const Tensor& weight_hh, const OptionalTensor& lengths, const std::string& output,
    const std::string& cell, const std::string& form, const Tensor& hidden, const Tensor& maps,
    const Tensor& gates, const Tensor& cells, const AttentionLstmWanted& wanted) {
  const Operands o(features, c0, score_weight, hidden_weight, hidden_bias, v, learned, temperature, weight_ih,
                   weight_hh, lengths, output, cell, form);
  const AttentionLstm& q = o.q;
  const int64_t B = q.batch, T = q.steps, H = q.hidden_size;
  const auto type = features.scalar_type();
  const std::array<int64_t, 5> map_sizes{B, T, 1, features.size(3), features.size(4)};
  check(h0, "h0", {B, H}, type);
  check(hidden, "hidden", {B, T, H}, type);
  check(maps, "maps", map_sizes, type);
  check(gates, "gates", {B, T, 4 * H}, o.wide);
  if (c0) check(cells, "cells", {B, T, H}, o.wide);
  check(grad_hidden_, "grad_hidden", {B, T, H}, type);
  check(grad_maps_, "grad_maps", map_sizes, type);
  const Saved saved{o.dense(h0), o.dense(hidden), o.dense(maps), o.dense(gates), o.dense(c0), o.dense(cells)};
  const OptionalTensor grad_hidden = o.dense(grad_hidden_), grad_maps = o.dense(grad_maps_);
  const StepGradients d = walk_back(o, saved, grad_hidden, grad_maps, grad_h, grad_c);

  AttentionLstmSteps s{};
  s.flatten = q.flatten;
  s.features = features, s.frames = o.features.view({B * T, q.channels, q.positions});
  s.score_weight = o.score_weight, s.weight_ih = o.weight_ih;
  s.lengths = o.lengths, s.learned = learned;
  s.h0 = saved.h0, s.hidden = saved.hidden, s.map = saved.maps.view({B * T, 1, q.positions});
  s.temperature = at::scalar_tensor(q.temperature, o.features.options());
  s.d_h = d.h, s.d_c = d.c, s.d_x = d.x, s.d_r = d.r;
  s.d_scaled = d.scaled, s.d_products = d.products, s.d_terms = d.terms, s.d_v = d.v;
  s.d_attended = d.attended;
  return attention_lstm_gradients(s, wanted);
}

}  // namespace

void bind_attention_lstm_cpu(pybind11::module_& m) {
  const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("attention_lstm_forward", &attention_lstm_forward, unlocked);
  m.def("attention_lstm_backward", &attention_lstm_backward, unlocked);
}

}  // namespace fusednn
