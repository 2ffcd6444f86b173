// fusednn._C.cpu: attention inside an LSTM or a GRU, over sequences.
#include "recurrence/cpu/params.h"

#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>

#include <limits>

#include "core/bindings/cpu_kernel.h"
#include "core/bindings/op.h"
#include "core/bindings/weight_cache.h"
#include "recurrence/bindings/calls.h"
#include "recurrence/bindings/gradients.h"

namespace fusednn {
namespace {

using at::Tensor;
using cpu::AttentionLstm;
using cpu::Cell;

bool choice(const std::string& got, const char* name, const char* first, const char* second) {
  TORCH_CHECK(got == first || got == second, name, ": got ", got, ", expected ", first, " or ", second);
  return got == first;
}

// T for arithmetic: the smallest normal number or more, NaN unless positive.
template <class T>
double temperature_of(const calls::Temperature& given) {
  const OptionalTensor& learned = given.learned_temperature;
  const double t = learned ? learned->item<double>() : given.temperature;
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

  Operands(const calls::RecurrenceTensors& a, const calls::RecurrenceOptions& options) {
    const auto& [features_, h0, c0, score_weight_, hidden_weight_, hidden_bias_, v_, given_temperature,
                 weight_ih_, weight_hh_] = a;
    const auto& [lengths_, output, cell, form] = options;
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
    q.temperature = type == at::kDouble ? temperature_of<double>(given_temperature)
                                        : temperature_of<float>(given_temperature);
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
    q.features = data_or_null(features);
    q.score_weight = data_or_null(score_weight);
    q.hidden_weight = data_or_null(hidden_weight);
    q.hidden_bias = data_or_null(hidden_bias);
    q.v = data_or_null(v);
    q.weight_ih = data_or_null(weight_ih);
    q.weight_hh = data_or_null(weight_hh);
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
  const PackingKey key{"attention_lstm", {static_cast<double>(q.channels), static_cast<double>(q.positions)}};
  return WeightCache::instance().find(key, {weight_ih}, [&] {
    const auto& kernels = cpu::kernels<cpu::AttentionLstmKernels>();
    const at::ScalarType type = q.dtype == DType::f64 ? at::kDouble : at::kFloat;
    const Tensor packed = at::empty({kernels.packed_elements(q)}, type);
    kernels.pack(q, packed.mutable_data_ptr(), torch_parallel());
    return packed;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_lstm_forward(
    const calls::AttentionLstmForward& a) {
  const Operands o(a.tensors, a.options);
  const auto& [features, h0, c0, score, hidden_weight, hidden_bias, v, temperature, weight_ih, weight_hh] =
      a.tensors;
  AttentionLstm q = o.q;
  check(a.bias_ih, "bias_ih", {q.gate_rows()}, features.scalar_type());
  check(a.bias_hh, "bias_hh", {q.gate_rows()}, features.scalar_type());
  const OptionalTensor bias_ih = o.dense(a.bias_ih), bias_hh = o.dense(a.bias_hh);
  const int64_t B = q.batch, T = q.steps, H = q.hidden_size;
  Tensor h = o.state(h0, "h0"), c = c0 ? o.state(*c0, "c0") : Tensor();
  Tensor hidden = o.make({B, T, H}), maps = o.make({B, T, 1, features.size(3), features.size(4)});
  Tensor gates = a.save ? o.make({B, T, 4 * H}) : Tensor(),
         cells = a.save && c0 ? o.make({B, T, H}) : Tensor();
  if (!o.empty()) {
    const Tensor packed = packed_weight(q, weight_ih, a.save);
    if (packed.defined()) q.packed = packed.const_data_ptr();
    const auto& kernels = cpu::kernels<cpu::AttentionLstmKernels>();
    run_kernel(kernels.forward_workspace, kernels.forward,
               {q, data_or_null(bias_ih), data_or_null(bias_hh), mutable_data_or_null(h),
                mutable_data_or_null(c), mutable_data_or_null(hidden), mutable_data_or_null(maps),
                mutable_data_or_null(gates), mutable_data_or_null(cells), nullptr});
  }
  const auto saved = [&](const Tensor& t) { return t.defined() ? t : o.make({0}); };
  return {o.stored(hidden), o.stored(maps), o.stored(h), o.stored(c), saved(gates), saved(cells)};
}

std::vector<Tensor> attention_lstm_backward(const calls::AttentionLstmBackward& a) {
  const Operands o(a.tensors, a.options);
  const Tensor& features = a.tensors.features;
  const AttentionLstm& q = o.q;
  const int64_t B = q.batch, T = q.steps, H = q.hidden_size, P = q.positions;
  const bool lstm = q.cell == Cell::lstm;
  const auto type = features.scalar_type();
  const std::array<int64_t, 5> map_sizes{B, T, 1, features.size(3), features.size(4)};
  check(a.tensors.h0, "h0", {B, H}, type);
  check(a.hidden, "hidden", {B, T, H}, type);
  check(a.maps, "maps", map_sizes, type);
  check(a.gates, "gates", {B, T, 4 * H}, o.wide);
  if (lstm) check(a.cells, "cells", {B, T, H}, o.wide);
  check(a.grad_hidden, "grad_hidden", {B, T, H}, type);
  check(a.grad_maps, "grad_maps", map_sizes, type);
  const Tensor gates = o.dense(a.gates), cells = o.dense(a.cells);
  const OptionalTensor c0 = o.dense(a.tensors.c0), grad_hidden = o.dense(a.grad_hidden),
                       grad_maps = o.dense(a.grad_maps);
  const auto zeros = [&](at::IntArrayRef sizes) { return at::zeros(sizes, o.features.options()); };
  const auto state = [&](const char* name, const OptionalTensor& grad) {
    return grad ? o.state(*grad, name) : zeros({B, H});
  };

  AttentionLstmSteps s{};
  s.flatten = q.flatten;
  s.features = features, s.frames = o.features.view({B * T, q.channels, P});
  s.score_weight = o.score_weight, s.weight_ih = o.weight_ih;
  s.lengths = o.lengths, s.learned = a.tensors.temperature.learned_temperature;
  s.h0 = o.dense(a.tensors.h0), s.hidden = o.dense(a.hidden), s.map = o.dense(a.maps).view({B * T, 1, P});
  s.temperature = at::scalar_tensor(q.temperature, o.features.options());
  s.d_h = state("grad_h", a.grad_h), s.d_c = lstm ? state("grad_c", a.grad_c) : Tensor();
  s.d_x = o.make({B, T, q.gate_rows()});
  s.d_r = lstm ? s.d_x : o.make({B, T, q.gate_rows()});
  s.d_scaled = o.make({B, T, P}), s.d_products = o.make({B, T, q.energies, P});
  s.d_terms = q.additive ? o.make({B, T, q.energies}) : s.d_products.view({B, T, P});
  if (q.additive) s.d_v = zeros({B, q.energies});
  if (q.flatten && !q.hoisted) s.d_attended = o.make({B, T, q.inputs()});
  if (!o.empty()) {
    const auto& kernels = cpu::kernels<cpu::AttentionLstmKernels>();
    run_kernel(kernels.backward_workspace, kernels.backward,
               {q, data_or_null(s.h0), data_or_null(c0), data_or_null(s.hidden), data_or_null(s.map),
                data_or_null(gates), lstm ? data_or_null(cells) : nullptr, data_or_null(grad_hidden),
                data_or_null(grad_maps), mutable_data_or_null(s.d_h), mutable_data_or_null(s.d_c),
                mutable_data_or_null(s.d_x), lstm ? nullptr : mutable_data_or_null(s.d_r),
                mutable_data_or_null(s.d_scaled), mutable_data_or_null(s.d_products),
                q.additive ? mutable_data_or_null(s.d_terms) : nullptr, mutable_data_or_null(s.d_v),
                mutable_data_or_null(s.d_attended), nullptr});
  }
  return attention_lstm_gradients(s, a.output_mask);
}

}  // namespace

FUSEDNN_BINDINGS(cpu) {
  op(m, "attention_lstm_forward", &attention_lstm_forward);
  op(m, "attention_lstm_backward", &attention_lstm_backward);
}

}  // namespace fusednn
