// fusednn._C.cpu: attention inside an LSTM or a GRU, over sequences.
#include "recurrence/cpu/params.h"

#include <ATen/ops/scalar_tensor.h>

#include <limits>

#include "core/bindings/cpu_kernel.h"
#include "core/bindings/op.h"
#include "recurrence/bindings/checked.h"

namespace fusednn {
namespace {

using at::Tensor;
using cpu::AttentionLstm;
using cpu::Cell;

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

// The operands in the arithmetic's dtype.
struct Operands : CheckedRecurrence {
  Tensor features;
  AttentionLstm q{};

  Operands(const char* op, const calls::RecurrenceTensors& a, const calls::RecurrenceOptions& options)
      : CheckedRecurrence(op, a, options), features(widened(a.features)) {
    check_on_cpu(*this);
    for (Tensor* t : {&score_weight, &hidden_weight, &weight_ih, &weight_hh}) *t = widened(*t);
    hidden_bias = widened(hidden_bias), v = widened(v);
    q.cell = lstm ? Cell::lstm : Cell::gru;
    q.dtype = wide() == at::kDouble ? DType::f64 : DType::f32;
    q.flatten = flatten, q.hoisted = hoisted, q.additive = additive;
    q.batch = batch, q.steps = steps, q.channels = channels, q.positions = positions();
    q.hidden_size = hidden_size, q.energies = energies;
    q.temperature =
        wide() == at::kDouble ? temperature_of<double>(a.temperature) : temperature_of<float>(a.temperature);
    q.features = data_or_null(features), q.score_weight = data_or_null(score_weight);
    q.hidden_weight = data_or_null(hidden_weight), q.hidden_bias = data_or_null(hidden_bias);
    q.v = data_or_null(v);
    q.weight_ih = data_or_null(weight_ih), q.weight_hh = data_or_null(weight_hh);
    if (lengths) q.lengths = lengths->const_data_ptr<int64_t>();
  }
  Operands(const Operands&) = delete;

  bool empty() const { return batch == 0; }
  Tensor make(at::IntArrayRef sizes) const { return at::empty(sizes, wide_options()); }
  Tensor stored(const Tensor& t) const { return t.defined() ? t.to(storage()) : at::empty({0}, options()); }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_lstm_forward(
    const calls::AttentionLstmForward& a) {
  const Operands o("attention_lstm_forward", a.tensors, a.options);
  const OptionalTensor& c0 = a.tensors.c0;
  const AttentionLstm& q = o.q;
  const OptionalTensor bias_ih = o.widened(o.dense("bias_ih", a.bias_ih, {q.gate_rows()})),
                       bias_hh = o.widened(o.dense("bias_hh", a.bias_hh, {q.gate_rows()}));
  const int64_t B = q.batch, T = q.steps, H = q.hidden_size;
  Tensor h = o.state("h0", a.tensors.h0), c = c0 ? o.state("c0", *c0) : Tensor();
  Tensor hidden = o.make({B, T, H}), maps = o.make(o.map_sizes());
  Tensor gates = a.save ? o.make({B, T, 4 * H}) : Tensor(),
         cells = a.save && c0 ? o.make({B, T, H}) : Tensor();
  if (!o.empty()) {
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
  const Operands o("attention_lstm_backward", a.tensors, a.options);
  const AttentionLstm& q = o.q;
  const int64_t B = q.batch, T = q.steps, P = q.positions;
  const OptionalTensor c0 = o.widened(a.tensors.c0),
                       grad_hidden = o.widened(o.dense("grad_hidden", a.grad_hidden, a.hidden.sizes())),
                       grad_maps = o.widened(o.dense("grad_maps", a.grad_maps, o.map_sizes()));
  AttentionLstmSteps s = o.backward_steps(a);
  const Tensor gates = a.gates.contiguous(), cells = a.cells.contiguous();
  s.frames = o.features.view({B * T, q.channels, P});
  s.temperature = at::scalar_tensor(q.temperature, o.wide_options());
  if (q.additive) s.d_v = at::zeros({B, q.energies}, o.wide_options());
  if (q.flatten && !q.hoisted) s.d_attended = o.make({B, T, q.inputs()});
  if (!o.empty()) {
    const auto& kernels = cpu::kernels<cpu::AttentionLstmKernels>();
    run_kernel(kernels.backward_workspace, kernels.backward,
               {q, data_or_null(s.h0), data_or_null(c0), data_or_null(s.hidden), data_or_null(s.map),
                data_or_null(gates), o.lstm ? data_or_null(cells) : nullptr, data_or_null(grad_hidden),
                data_or_null(grad_maps), mutable_data_or_null(s.d_h), mutable_data_or_null(s.d_c),
                mutable_data_or_null(s.d_x), o.lstm ? nullptr : mutable_data_or_null(s.d_r),
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
