// Python face of the CUDA launchers of attend-and-recur.
//
// Products over all steps are torch's, before and after the kernels of the recurrence; nothing waits for the
// device, so that a call can be captured in a graph. Device-agnostic, as rnn/bindings/cuda.cpp.
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <cuda_runtime_api.h>

#include <limits>
#include <tuple>
#include <utility>

#include "core/bindings/cuda_arguments.h"
#include "core/bindings/op.h"
#include "recurrence/bindings/checked.h"
#include "recurrence/cuda/params.h"

namespace fusednn {
namespace {

using at::Tensor;
using cuda::AttentionLstm;
using cuda::CellInput;

constexpr size_t kSharedBytes = 96 * 1024;  // of a block on every target

// Sizes of a call, and why the kernels can't serve it.
AttentionLstm sizes_of(const Tensor& features, const Tensor& score_weight, const Tensor& weight_hh, bool lstm,
                       bool additive) {
  AttentionLstm q{};
  q.dtype = dtype_of(features, "features");
  q.lstm = lstm, q.additive = additive;
  q.batch = features.size(0);
  q.steps = static_cast<int>(features.size(1));
  q.channels = static_cast<int>(features.size(2));
  q.positions = static_cast<int>(features.size(3) * features.size(4));
  q.hidden_size = static_cast<int>(weight_hh.size(1));
  q.energies = static_cast<int>(score_weight.size(0));
  return q;
}

std::vector<std::string> attention_lstm_limits(const Tensor& features, const Tensor& score_weight,
                                               const Tensor& weight_hh, bool lstm, bool additive) {
  std::vector<std::string> reasons;
  const auto most = [&](const char* name, int64_t got, int64_t limit) {
    if (got < 1 || got > limit)
      reasons.push_back(c10::str("got ", got, " ", name, ", expected 1 to ", limit));
  };
  constexpr int64_t small = 1 << 24;
  if (features.size(0) > std::numeric_limits<int>::max()) most("sequences", features.size(0), small);
  most("steps", features.size(1), small);
  most("channels", features.size(2), small);
  most("positions", features.size(3) * features.size(4), small);
  most("hidden units", weight_hh.size(1), small);
  most("rows of score_weight", score_weight.size(0), small);
  if (!reasons.empty()) return reasons;
  const size_t bytes =
      cuda::attention_lstm_shared_bytes(sizes_of(features, score_weight, weight_hh, lstm, additive));
  if (bytes > kSharedBytes)
    reasons.push_back(c10::str("a step needs ", bytes, " bytes of shared memory, expected at most ",
                               kSharedBytes, ": fewer hidden units or positions"));
  return reasons;
}

// A call's tensors as the kernels take them.
struct Recurrence : CheckedRecurrence {
  AttentionLstm q;
  Tensor frames;  // wide [F, C, P]
  Tensor temperature;

  Recurrence(const char* op, const calls::RecurrenceTensors& a, const calls::RecurrenceOptions& options)
      : CheckedRecurrence(op, a, options) {
    const auto limits = attention_lstm_limits(a.features, a.score_weight, a.weight_hh, lstm, additive);
    TORCH_CHECK(limits.empty(), op, ": ", limits.front());
    q = sizes_of(a.features, a.score_weight, a.weight_hh, lstm, additive);
    q.input = hoisted ? CellInput::projected : (flatten ? CellInput::between : CellInput::sum);
    q.v = data_or_null(v);
    if (lengths) q.lengths = lengths->const_data_ptr<int64_t>();
    set_temperature(a.temperature);
    set_frames(a.features);
  }

  // Both weights of the state: [J + Q, H].
  Tensor state_weights() const { return at::cat({weight_hh, hidden_weight}); }

 private:
  void set_temperature(const calls::Temperature& given) {
    const OptionalTensor& learned = given.learned_temperature;
    const double fixed = given.temperature;
    q.temperature = fixed;
    const double tiny = wide() == at::kDouble ? std::numeric_limits<double>::min()
                                              : static_cast<double>(std::numeric_limits<float>::min());
    if (!learned) {
      const double most = wide() == at::kDouble ? std::numeric_limits<double>::max()
                                                : static_cast<double>(std::numeric_limits<float>::max());
      const double infinity = std::numeric_limits<double>::infinity();
      temperature = at::full({}, fixed > most ? infinity : std::max(fixed, tiny), wide_options());
      return;
    }
    learned_ = learned->to(wide_options()).reshape({});
    q.learned_temperature = learned_.const_data_ptr();
    temperature = learned_.clamp_min(tiny).masked_fill(learned_.gt(0).logical_not(),
                                                       std::numeric_limits<double>::quiet_NaN());
  }

  // score_weight times all frames, and weight_ih times all positions of all frames where that is hoisted.
  void set_frames(const Tensor& features) {
    const int64_t C = q.channels, P = q.positions, F = q.batch * q.steps, J = q.gate_rows();
    const Tensor images = features.flatten(0, 1);
    const auto format =
        q.input == CellInput::between ? at::MemoryFormat::Contiguous : images.suggest_memory_format();
    q.channels_last = format == at::MemoryFormat::ChannelsLast;
    features_ = images.contiguous(format);
    frames = features_.to(wide()).flatten(2);
    products_ = at::bmm(score_weight.to(wide()).unsqueeze(0).expand({F, q.energies, C}), frames).contiguous();
    q.products = products_.const_data_ptr();
    if (q.input != CellInput::projected) {
      q.features = features_.const_data_ptr();
      return;
    }
    const Tensor weight = weight_ih.to(wide());
    if (flatten) {  // [P, F, J]
      projected_ = at::bmm(frames.permute({2, 0, 1}), weight.view({J, C, P}).permute({2, 1, 0})).contiguous();
      q.frame_stride = J, q.position_stride = F * J;
    } else {  // [F, P, J]
      projected_ = at::matmul(frames.transpose(1, 2), weight.t()).contiguous();
      q.frame_stride = P * J, q.position_stride = J;
    }
    q.projected = projected_.const_data_ptr();
  }

  Tensor learned_, features_, products_, projected_;
};

const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* data(Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// All steps, or one at a time around the product that all sequences share.
void run_forward(const Recurrence& r, cuda::AttentionLstmForward p, CUstream_st* stream) {
  const AttentionLstm& q = r.q;
  if (q.input != CellInput::between) {
    p.q.first = 0, p.q.last = q.steps;
    return launched(r, cuda::attention_lstm_forward(p, stream));
  }
  const auto options = r.wide_options();
  const Tensor weight = r.weight_ih.to(r.wide()).t();
  Tensor attended = at::zeros({q.batch, int64_t{q.channels} * q.positions}, options);
  Tensor x = at::empty({q.batch, q.gate_rows()}, options), state_product = at::empty_like(x);
  p.attended = data(attended), p.x = data(x), p.r = data(state_product);
  for (int t = 0; t <= q.steps; ++t) {
    p.q.first = t, p.q.last = t + 1;
    launched(r, cuda::attention_lstm_forward(p, stream));
    if (t < q.steps) at::mm_out(x, attended, weight);
  }
}

SixTensors attention_lstm_forward(const calls::AttentionLstmForward& a) {
  const Tensor& features = a.tensors.features;
  const OptionalTensor& c0 = a.tensors.c0;
  const c10::DeviceGuard guard(features.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Recurrence r("attention_lstm_forward", a.tensors, a.options);
  const AttentionLstm& q = r.q;
  const int64_t B = q.batch, T = q.steps, H = q.hidden_size, J = q.gate_rows();
  const OptionalTensor bias_ih = r.dense("bias_ih", a.bias_ih, {J}),
                       bias_hh = r.dense("bias_hh", a.bias_hh, {J});
  const Tensor weight = r.state_weights().t().contiguous();
  const Tensor weight_of_sum = q.input == CellInput::sum ? r.weight_ih.t().contiguous() : Tensor();
  Tensor h = r.state("h0", a.tensors.h0), c = c0 ? r.state("c0", *c0) : Tensor();
  Tensor hidden = r.made({B, T, H}, r.storage());
  Tensor maps = r.made(r.map_sizes(), r.storage());
  Tensor gates = a.save ? r.made({B, T, 4 * H}) : at::empty({0}, h.options());
  Tensor cells = a.save && c0 ? r.made({B, T, H}) : at::empty({0}, h.options());
  cuda::AttentionLstmForward p{};
  p.q = q;
  p.weight = data(weight), p.weight_ih = data(weight_of_sum);
  p.bias_ih = data_or_null(bias_ih), p.bias_hh = data_or_null(bias_hh);
  p.hidden_bias = data_or_null(r.hidden_bias);
  p.h = data(h), p.c = data(c), p.hidden = data(hidden), p.maps = data(maps);
  p.gates = a.save ? data(gates) : nullptr, p.cells = a.save && c0 ? data(cells) : nullptr;
  run_forward(r, p, current_stream(features));
  return {hidden, maps, h.to(r.storage()), c.defined() ? c.to(r.storage()) : at::empty({0}, r.options()),
          gates,  cells};
}

void run_backward(const Recurrence& r, cuda::AttentionLstmBackward p, const Tensor& d_x,
                  CUstream_st* stream) {
  const AttentionLstm& q = r.q;
  if (q.input != CellInput::between) {
    p.q.first = 0, p.q.last = q.steps;
    return launched(r, cuda::attention_lstm_backward(p, stream));
  }
  const Tensor weight = r.weight_ih.to(r.wide());
  Tensor d_attended = at::empty({q.batch, weight.size(1)}, weight.options());
  p.d_attended = data(d_attended);
  for (int t = q.steps; t >= 0; --t) {
    p.q.first = t, p.q.last = t + 1;
    launched(r, cuda::attention_lstm_backward(p, stream));
    if (t > 0) at::mm_out(d_attended, d_x.select(1, t - 1), weight);
  }
}

std::vector<Tensor> attention_lstm_backward(const calls::AttentionLstmBackward& a) {
  const Tensor& features = a.tensors.features;
  const c10::DeviceGuard guard(features.device());
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const Recurrence r("attention_lstm_backward", a.tensors, a.options);
  const AttentionLstm& q = r.q;
  const int64_t B = q.batch, T = q.steps, H = q.hidden_size, K = q.energies;
  AttentionLstmSteps s = r.backward_steps(a);
  const Tensor h0 = a.tensors.h0.contiguous(), hidden = a.hidden.contiguous(), maps = a.maps.contiguous(),
               gates = a.gates.contiguous(), cells = q.lstm ? a.cells.contiguous() : Tensor();
  const OptionalTensor c0 = dense(a.tensors.c0);
  const OptionalTensor grad_hidden = r.dense("grad_hidden", a.grad_hidden, {B, T, H});
  const OptionalTensor grad_maps = r.dense("grad_maps", a.grad_maps, r.map_sizes());
  s.frames = r.frames, s.temperature = r.temperature;
  Tensor terms;
  if (q.additive) {
    s.d_v = r.made({B * T, K});
    const Tensor h_prev = at::cat({s.h0.unsqueeze(1), s.hidden.slice(1, 0, T - 1)}, 1);
    terms = at::matmul(h_prev, r.hidden_weight.to(r.wide()).t()).contiguous();
    if (r.hidden_bias) terms.add_(*r.hidden_bias);
  }
  const Tensor weight = r.state_weights();
  cuda::AttentionLstmBackward p{};
  p.q = q;
  p.weight = data(weight), p.weight_ih = data(r.weight_ih);
  p.h0 = data(h0), p.c0 = data_or_null(c0), p.hidden = data(hidden), p.maps = data(maps);
  p.gates = data(gates), p.cells = data(cells);
  p.grad_hidden = data_or_null(grad_hidden), p.grad_maps = data_or_null(grad_maps);
  p.terms = data(std::as_const(terms));
  p.d_h = data(s.d_h), p.d_c = data(s.d_c), p.d_x = data(s.d_x), p.d_r = q.lstm ? nullptr : data(s.d_r);
  p.d_scaled = data(s.d_scaled), p.d_products = data(s.d_products);
  p.d_terms = q.additive ? data(s.d_terms) : nullptr, p.d_v = data(s.d_v);
  run_backward(r, p, s.d_x, current_stream(features));
  return attention_lstm_gradients(s, a.output_mask);
}

}  // namespace

FUSEDNN_BINDINGS(cuda) {
  m.def("attention_lstm_limits", &attention_lstm_limits);
  op(m, "attention_lstm_forward", &attention_lstm_forward);
  op(m, "attention_lstm_backward", &attention_lstm_backward);
}

}  // namespace fusednn
