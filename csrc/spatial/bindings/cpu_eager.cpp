// The eager shortcut of SpatialAttention on CPU tensors, as docs/design/006-eager-shortcut.md has it: one
// call into the extension for the state's projection, the attention and one autograd node for both. Nothing
// is returned where any condition fails; the caller then takes the general way, which also words the errors.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include "core/bindings/bindings.h"
#include "core/bindings/eager_call.h"
#include "spatial/bindings/cpu.h"

namespace fusednn {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Positional scores of a layer that is given a state.
struct Layer {
  Tensor features, hidden;            // [N, C, H, W], [N, S]
  Tensor score;                       // [G, C, 1, 1]
  Tensor hidden_weight, hidden_bias;  // [G P, S], [G P]
  double temperature;
  std::string output;
};

bool plain_layer(const Layer& l, bool& record) {
  if (!nobody_listens() || !plain(l.features) || !supported(l.features.scalar_type())) return false;
  if (l.features.dim() != 4 || l.features.numel() == 0 || l.hidden.dim() != 2 || l.score.dim() != 4)
    return false;
  const int64_t n = l.features.size(0), size = l.hidden.size(1),
                terms = l.score.size(0) * l.features.size(2) * l.features.size(3);
  PlainCall call{l.features.scalar_type()};
  call(l.features, l.features.sizes());
  call(l.hidden, {n, size});
  call(l.score, {l.score.size(0), l.features.size(1), 1, 1});
  call(l.hidden_weight, {terms, size});
  call(l.hidden_bias, {terms});
  record = call.requires_grad && at::GradMode::is_enabled();
  return call.ok && !(record && below_autograd());
}

Tensor projected(const Layer& l) {
  const Tensor term = at::addmm(l.hidden_bias, l.hidden, l.hidden_weight.t());
  return term.view({l.features.size(0), l.score.size(0), -1});
}

std::tuple<Tensor, Tensor> attend(const Layer& l, const Tensor& term) {
  return spatial_attention_forward(l.features, l.score.flatten(1), term, {}, {}, {}, l.temperature, l.output);
}

// The backward as the reference writes it, in torch ops that can be differentiated again.
variable_list differentiable_backward(const variable_list& saved, const variable_list& grads,
                                      const std::array<bool, 5>& needs, double temperature,
                                      const std::string& output) {
  const pybind11::gil_scoped_acquire gil;
  const auto argument = [](const Tensor& t) {
    return t.defined() ? pybind11::cast(t) : pybind11::object(pybind11::none());
  };
  pybind11::list tensors, cotangents;
  for (int i = 0; i < 5; ++i) tensors.append(argument(saved[i]));
  for (const Tensor& t : grads) cotangents.append(argument(t));
  const auto shortcut = pybind11::module_::import("fusednn.spatial.shortcut");
  variable_list result;
  for (const auto& g : shortcut.attr("layer_gradients")(tensors, cotangents, needs, temperature, output))
    result.push_back(g.is_none() ? Tensor() : g.cast<Tensor>());
  return result;
}

struct LayerNode : torch::autograd::Function<LayerNode> {
  static variable_list forward(AutogradContext* ctx, const Tensor& features, const Tensor& hidden,
                               const Tensor& score, const Tensor& hidden_weight, const Tensor& hidden_bias,
                               const Layer& layer) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto [attended, map] = attend(layer, projected(layer));
    ctx->save_for_backward({features, hidden, score, hidden_weight, hidden_bias, map});
    ctx->saved_data["temperature"] = layer.temperature;
    ctx->saved_data["output"] = layer.output;
    ctx->set_materialize_grads(false);
    return {attended, map};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(6);
    if (!grads[0].defined() && !grads[1].defined()) return result;
    const variable_list s = ctx->get_saved_variables();
    const double temperature = ctx->saved_data["temperature"].toDouble();
    const std::string output = ctx->saved_data["output"].toStringRef();
    std::array<bool, 5> needs;
    for (int i = 0; i < 5; ++i) needs[i] = ctx->needs_input_grad(i);
    if (watched(grads)) {
      const variable_list found = differentiable_backward(s, grads, needs, temperature, output);
      std::copy(found.begin(), found.end(), result.begin());
      return result;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto &features = s[0], &hidden = s[1], &score = s[2], &hidden_weight = s[3];
    const int64_t n = features.size(0);
    const bool term_needed = needs[1] || needs[3] || needs[4];
    // Of the hidden term the backward wants to know the shape alone.
    const Tensor term = s[5].flatten(2);
    const auto [d_features, d_score, d_term, d_v, d_t] = spatial_attention_backward(
        optional(grads[0]), optional(grads[1]), features, score.flatten(1), term, {}, {}, {}, temperature,
        output, s[5], {needs[0], needs[2], term_needed, false, false});
    if (needs[0]) result[0] = d_features;
    if (needs[2]) result[2] = d_score.view(score.sizes());
    if (!term_needed) return result;
    const Tensor d = d_term.view({n, -1});
    if (needs[1]) result[1] = at::mm(d, hidden_weight);
    if (needs[3]) result[3] = at::mm(d.t(), hidden);
    if (needs[4]) result[4] = d.sum(0);
    return result;
  }
};

std::optional<std::tuple<Tensor, Tensor>> try_spatial_attention(const Tensor& features, const Tensor& hidden,
                                                                const Tensor& score,
                                                                const Tensor& hidden_weight,
                                                                const Tensor& hidden_bias, double temperature,
                                                                const std::string& output) {
  const Layer layer{features, hidden, score, hidden_weight, hidden_bias, temperature, output};
  bool record = false;
  if (!plain_layer(layer, record)) return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  if (record) {
    const variable_list out = LayerNode::apply(features, hidden, score, hidden_weight, hidden_bias, layer);
    return std::make_tuple(out[0], out[1]);
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  return attend(layer, projected(layer));
}

}  // namespace

void bind_spatial_cpu_eager(pybind11::module_& m) { m.def("try_spatial_attention", &try_spatial_attention); }

}  // namespace fusednn
