// The eager shortcut of MultiheadAttention on CPU tensors, as docs/design/006-eager-shortcut.md has it: both
// projections and the attention in one call, and one autograd node for them, whose gradients of query, key
// and value are written where the gradient of the packed projection wants them. Nothing is returned where any
// condition fails; the caller then takes the general way, which also words the errors.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include "attention/bindings/cpu.h"
#include "core/bindings/bindings.h"
#include "core/bindings/eager_call.h"

namespace fusednn {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kFewestRows = 64;  // as in fusednn/attention/backends.py

// Self-attention without masks but that of padding.
struct Layer {
  Tensor input;  // [B, L, E], or [L, B, E]
  bool batch_first;
  int64_t heads;
  Tensor in_weight, out_weight;               // [3 E, E], [E, E]
  OptionalTensor in_bias, out_bias, padding;  // [3 E], [E], [B, L] (bool: True is ignored; or added)
  std::string weights;

  int64_t size() const { return input.size(2); }
  bool ours() const {
    return input.scalar_type() == at::kFloat && input.size(0) * input.size(1) >= kFewestRows;
  }
  Tensor rows(const Tensor& t) const { return t.view({-1, t.size(-1)}); }
  Tensor project(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) const {
    return ours() ? projection_forward(x, weight, bias) : at::linear(x, weight, bias);
  }
  // [rows, n E] as n tensors [B, H, L, D].
  Tensor heads_of(const Tensor& t, int64_t n, int64_t which) const {
    const Tensor split = t.view({input.size(0), input.size(1), n, heads, -1}).select(2, which);
    return batch_first ? split.permute({0, 2, 1, 3}) : split.permute({1, 2, 0, 3});
  }
  std::array<Tensor, 3> three(const Tensor& t) const {
    return {heads_of(t, 3, 0), heads_of(t, 3, 1), heads_of(t, 3, 2)};
  }
};

bool plain_layer(const Layer& l, bool& record) {
  const Tensor& x = l.input;
  if (!nobody_listens() || !plain(x) || !supported(x.scalar_type()) || x.dim() != 3 || x.numel() == 0)
    return false;
  const int64_t e = x.size(2), batch = x.size(l.batch_first ? 0 : 1), rows = x.size(l.batch_first ? 1 : 0);
  PlainCall call{x.scalar_type()};
  call(x, x.sizes());
  call(l.in_weight, {3 * e, e});
  call(l.in_bias, {3 * e});
  call(l.out_weight, {e, e});
  call(l.out_bias, {e});
  if (l.padding) {
    const Tensor& p = *l.padding;
    const bool kind = p.scalar_type() == at::kBool || p.scalar_type() == x.scalar_type();
    if (!plain(p) || !kind || p.requires_grad() || p.sizes() != at::IntArrayRef({batch, rows})) return false;
  }
  record = call.requires_grad && at::GradMode::is_enabled();
  return call.ok && e % l.heads == 0 && !(record && below_autograd());
}

struct Parts {
  Tensor result, weights, input, heads, attended, lse;  // input [M, E], heads [M, 3 E], attended [M, E]
  OptionalTensor key_mask;
};

Parts attend(const Layer& l, bool with_lse) {
  Parts p;
  p.input = l.rows(l.input.contiguous());
  p.heads = l.project(p.input, l.in_weight, l.in_bias);
  if (l.padding) p.key_mask = l.padding->scalar_type() == at::kBool ? l.padding->logical_not() : *l.padding;
  p.attended = at::empty_like(p.input);
  std::tie(std::ignore, p.lse, p.weights) =
      self_attention_forward(l.three(p.heads), p.key_mask, l.weights, l.heads_of(p.attended, 1, 0), with_lse);
  p.result = l.project(p.attended, l.out_weight, l.out_bias).view(l.input.sizes());
  return p;
}

// The backward as the reference writes it, in torch ops that can be differentiated again.
variable_list differentiable_backward(const variable_list& saved, const variable_list& grads,
                                      const std::array<bool, 5>& needs, int64_t heads, bool batch_first,
                                      const std::string& weights) {
  const pybind11::gil_scoped_acquire gil;
  const auto argument = [](const Tensor& t) {
    return t.defined() ? pybind11::cast(t) : pybind11::object(pybind11::none());
  };
  pybind11::list tensors, cotangents;
  for (int i = 0; i < 5; ++i) tensors.append(argument(saved[i]));
  for (const Tensor& t : grads) cotangents.append(argument(t));
  const auto shortcut = pybind11::module_::import("fusednn.attention.shortcut");
  variable_list result;
  for (const auto& g : shortcut.attr("layer_gradients")(tensors, argument(saved[5]), cotangents, needs, heads,
                                                        batch_first, weights))
    result.push_back(g.is_none() ? Tensor() : g.cast<Tensor>());
  return result;
}

struct ProjectionGradients {
  Tensor input, weight, bias;
};

ProjectionGradients project_backward(const Layer& l, const Tensor& grad, const Tensor& input,
                                     const Tensor& weight, std::array<bool, 3> needs) {
  ProjectionGradients g;
  if (l.ours()) {
    std::tie(g.input, g.weight, g.bias) = projection_backward(grad, input, weight, needs);
    return g;
  }
  if (needs[0]) g.input = at::mm(grad, weight);
  if (needs[1]) g.weight = at::mm(grad.t(), input);
  if (needs[2]) g.bias = grad.sum(0);
  return g;
}

struct LayerNode : torch::autograd::Function<LayerNode> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& in_weight,
                               const OptionalTensor& in_bias, const Tensor& out_weight,
                               const OptionalTensor& out_bias, const Layer& layer) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Parts p = attend(layer, true);
    ctx->save_for_backward({input, in_weight, or_undefined(in_bias), out_weight, or_undefined(out_bias),
                            or_undefined(p.key_mask), p.heads, p.attended, p.lse});
    ctx->saved_data["heads"] = layer.heads;
    ctx->saved_data["batch_first"] = layer.batch_first;
    ctx->saved_data["weights"] = layer.weights;
    ctx->set_materialize_grads(false);
    if (layer.weights == "none") ctx->mark_non_differentiable({p.weights});
    return {p.result, p.weights};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(6);
    Layer l;
    l.weights = ctx->saved_data["weights"].toStringRef();
    if (l.weights == "none") grads[1] = Tensor();
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const variable_list s = ctx->get_saved_variables();
    l.heads = ctx->saved_data["heads"].toInt();
    l.batch_first = ctx->saved_data["batch_first"].toBool();
    std::array<bool, 5> needs{};
    int edge = 0;  // a bias that is not there has none
    for (int i = 0; i < 5; ++i) needs[i] = s[i].defined() && ctx->needs_input_grad(edge++);
    if (watched(grads)) {
      const variable_list found = differentiable_backward(s, grads, needs, l.heads, l.batch_first, l.weights);
      std::copy(found.begin(), found.end(), result.begin());
      return result;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    l.input = s[0];
    const Tensor &heads = s[6], &attended = s[7];
    const bool into_heads = needs[0] || needs[1] || needs[2];
    OptionalTensor d_attended;
    if (grads[0].defined()) {
      const Tensor g = l.rows(grads[0].contiguous());
      const auto out = project_backward(l, g, attended, s[3], {into_heads, needs[3], needs[4]});
      if (needs[3]) result[3] = out.weight;
      if (needs[4]) result[4] = out.bias;
      if (into_heads) d_attended = l.heads_of(out.input, 1, 0);
    }
    if (!into_heads) return result;
    const Tensor d_heads = at::empty_like(heads);
    OptionalTensor d_weights;
    if (grads[1].defined()) d_weights = grads[1].contiguous();
    self_attention_backward(d_attended, d_weights, l.three(heads), optional(s[5]), l.weights,
                            l.heads_of(attended, 1, 0), s[8], l.three(d_heads));
    const auto in =
        project_backward(l, d_heads, l.rows(l.input.contiguous()), s[1], {needs[0], needs[1], needs[2]});
    if (needs[0]) result[0] = in.input.view(l.input.sizes());
    if (needs[1]) result[1] = in.weight;
    if (needs[2]) result[2] = in.bias;
    return result;
  }
};

std::optional<std::tuple<Tensor, Tensor>> try_multihead_attention(
    const Tensor& input, const Tensor& in_weight, const OptionalTensor& in_bias, const Tensor& out_weight,
    const OptionalTensor& out_bias, const OptionalTensor& padding, int64_t heads, bool batch_first,
    const std::string& weights) {
  const Layer layer{input, batch_first, heads, in_weight, out_weight, in_bias, out_bias, padding, weights};
  bool record = false;
  if (!plain_layer(layer, record)) return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  if (record) {
    const variable_list out = LayerNode::apply(input, in_weight, in_bias, out_weight, out_bias, layer);
    return std::make_tuple(out[0], out[1]);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  const Parts p = attend(layer, false);
  return std::make_tuple(p.result, p.weights);
}

}  // namespace

void bind_attention_cpu_eager(pybind11::module_& m) {
  m.def("try_multihead_attention", &try_multihead_attention);
}

}  // namespace fusednn
