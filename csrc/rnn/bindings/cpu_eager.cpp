// The eager shortcut of LSTM and GRU cells on CPU tensors; see rnn_cpu.h and
// docs/design/006-eager-shortcut.md.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include "core/bindings/eager_call.h"
#include "rnn/bindings/cpu.h"

namespace fusednn {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether this is a plain call of consistent shapes; `requires_grad` says if it is to be recorded.
bool plain_call(int gates, const Tensor& input, std::initializer_list<Tensor> states, const Tensor& weight_ih,
                const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                bool& requires_grad) {
  if (input.dim() != 2 || weight_hh.dim() != 2 || !supported(input.scalar_type()) || !nobody_listens())
    return false;
  const int64_t batch = input.size(0), hidden = weight_hh.size(1), rows = gates * hidden;
  PlainCall plain{input.scalar_type()};
  plain(input, input.sizes());
  for (const Tensor& state : states) plain(state, {batch, hidden});
  plain(weight_ih, {rows, input.size(1)});
  plain(weight_hh, {rows, hidden});
  plain(bias_ih, {rows});
  plain(bias_hh, {rows});
  requires_grad = plain.requires_grad && at::GradMode::is_enabled();
  return plain.ok && !(requires_grad && below_autograd());
}

// The backward as the reference writes it, in torch ops that can be differentiated again.
variable_list differentiable_backward(const char* function, const variable_list& saved,
                                      const variable_list& grads) {
  const pybind11::gil_scoped_acquire gil;
  const auto argument = [](const Tensor& t) {
    return t.defined() ? pybind11::cast(t) : pybind11::object(pybind11::none());
  };
  pybind11::list tensors, cotangents;
  for (const Tensor& t : saved) tensors.append(argument(t));
  for (const Tensor& t : grads) cotangents.append(argument(t));
  const auto reference = pybind11::module_::import("fusednn.rnn.reference");
  variable_list result;
  for (const auto& gradient : reference.attr(function)(cotangents, tensors))
    result.push_back(gradient.is_none() ? Tensor() : gradient.cast<Tensor>());
  return result;
}

struct LstmCell : torch::autograd::Function<LstmCell> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& hx, const Tensor& cx,
                               const Tensor& weight_ih, const Tensor& weight_hh,
                               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [h, c, gates] = lstm_cell_forward(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, true);
    // A copy of c: the caller may write into the result, as with torch's cell.
    ctx->save_for_backward({input, hx, cx, weight_ih, weight_hh, or_undefined(bias_ih), or_undefined(bias_hh),
                            c.clone(), gates});
    ctx->set_materialize_grads(false);
    return {h, c};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined() && !grads[1].defined()) return variable_list(7);
    const variable_list s = ctx->get_saved_variables();
    if (watched(grads))
      return differentiable_backward("lstm_cell_gradients", variable_list(s.begin(), s.begin() + 7), grads);
    const auto needs = [&](int i) { return ctx->needs_input_grad(i); };
    const bool bias_ih = s[5].defined() && needs(5),
               bias_hh = s[6].defined() && needs(s[5].defined() ? 6 : 5);
    const std::array<bool, 6> mask = {needs(0), needs(1), needs(2), needs(3), needs(4), bias_ih || bias_hh};
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [input, hx, cx, w_ih, w_hh, bias] = lstm_cell_backward(optional(grads[0]), optional(grads[1]), s[0],
                                                                s[1], s[2], s[3], s[4], s[7], s[8], mask);
    const auto where = [](bool needed, const Tensor& t) { return needed ? t : Tensor(); };
    return {where(mask[0], input), where(mask[1], hx),   where(mask[2], cx),  where(mask[3], w_ih),
            where(mask[4], w_hh),  where(bias_ih, bias), where(bias_hh, bias)};
  }
};

struct GruCell : torch::autograd::Function<GruCell> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& hx,
                               const Tensor& weight_ih, const Tensor& weight_hh,
                               const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [h, gates] = gru_cell_forward(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, true);
    ctx->save_for_backward(
        {input, hx, weight_ih, weight_hh, or_undefined(bias_ih), or_undefined(bias_hh), gates});
    ctx->set_materialize_grads(false);
    return {h};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(6);
    const variable_list s = ctx->get_saved_variables();
    if (watched(grads))
      return differentiable_backward("gru_cell_gradients", variable_list(s.begin(), s.begin() + 6), grads);
    const auto needs = [&](int i) { return ctx->needs_input_grad(i); };
    const bool bias_ih = s[4].defined() && needs(4),
               bias_hh = s[5].defined() && needs(s[4].defined() ? 5 : 4);
    const std::array<bool, 6> mask = {needs(0), needs(1), needs(2), needs(3), bias_ih, bias_hh};
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [input, hx, w_ih, w_hh, b_ih, b_hh] =
        gru_cell_backward(grads[0], s[0], s[1], s[2], s[3], s[6], mask);
    const auto where = [](bool needed, const Tensor& t) { return needed ? t : Tensor(); };
    return {where(mask[0], input), where(mask[1], hx),   where(mask[2], w_ih),
            where(mask[3], w_hh),  where(mask[4], b_ih), where(mask[5], b_hh)};
  }
};

}  // namespace

std::optional<std::tuple<Tensor, Tensor>> try_lstm_cell(const Tensor& input, const Tensor& hx,
                                                        const Tensor& cx, const Tensor& weight_ih,
                                                        const Tensor& weight_hh,
                                                        const OptionalTensor& bias_ih,
                                                        const OptionalTensor& bias_hh) {
  bool record = false;
  if (!plain_call(4, input, {hx, cx}, weight_ih, weight_hh, bias_ih, bias_hh, record)) return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  if (record) {
    const variable_list out = LstmCell::apply(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh);
    return std::make_tuple(out[0], out[1]);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  auto [h, c, gates] = lstm_cell_forward(input, hx, cx, weight_ih, weight_hh, bias_ih, bias_hh, false);
  return std::make_tuple(h, c);
}

std::optional<Tensor> try_gru_cell(const Tensor& input, const Tensor& hx, const Tensor& weight_ih,
                                   const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                   const OptionalTensor& bias_hh) {
  bool record = false;
  if (!plain_call(3, input, {hx}, weight_ih, weight_hh, bias_ih, bias_hh, record)) return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  if (record) return GruCell::apply(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)[0];
  const at::AutoDispatchBelowADInplaceOrView below;
  return std::get<0>(gru_cell_forward(input, hx, weight_ih, weight_hh, bias_ih, bias_hh, false));
}

}  // namespace fusednn
