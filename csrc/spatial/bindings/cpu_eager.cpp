// The eager shortcut of SpatialAttention on CPU tensors (core/bindings/eager.h): the state's projection and
// the attention, with positional scores.
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include "core/bindings/eager.h"
#include "spatial/bindings/cpu.h"

namespace fusednn {
namespace {

using at::Tensor;

struct LayerOptions {
  double temperature;
  std::string output;
  FUSEDNN_ARGUMENTS(temperature, output)
};

struct LayerCall {
  Tensor features, hidden;            // [N, C, H, W], [N, S]
  Tensor score;                       // [G, C, 1, 1]
  Tensor hidden_weight, hidden_bias;  // [G P, S], [G P]
  LayerOptions options;
  FUSEDNN_ARGUMENTS(features, hidden, score, hidden_weight, hidden_bias, options)
};

calls::SpatialAttentionForward attention(at::TensorList t, const Tensor& term, const LayerOptions& options) {
  return {t[0], t[2].flatten(1), term, {}, {}, {{}, options.temperature}, options.output};
}

struct Layer {
  static constexpr const char* name = "spatial_attention_layer";
  static constexpr size_t inputs = 5;
  using Options = LayerOptions;

  static EagerResults forward(at::TensorList t, const Options& options, bool) {
    const Tensor term = at::addmm(t[4], t[1], t[3].t()).view({t[0].size(0), t[2].size(0), -1});
    const auto [attended, map] = spatial_attention_forward(attention(t, term, options));
    return {{attended, map}, {map}};
  }

  static std::array<Tensor, inputs> backward(at::TensorList t, at::TensorList saved,
                                             const variable_list& grads,
                                             const std::array<bool, inputs>& needs, const Options& options) {
    const Tensor &hidden = t[1], &score = t[2], &hidden_weight = t[3], &map = saved[0];
    const bool term_needed = needs[1] || needs[3] || needs[4];
    // Of the hidden term the backward wants to know the shape alone.
    const auto [d_features, d_score, d_term, d_v, d_temperature] =
        spatial_attention_backward({optional(grads[0]),
                                    optional(grads[1]),
                                    attention(t, map.flatten(2), options),
                                    map,
                                    {needs[0], needs[2], term_needed, false, false}});
    std::array<Tensor, inputs> result{
        d_features, {}, needs[2] ? d_score.view(score.sizes()) : Tensor(), {}, {}};
    if (!term_needed) return result;
    const Tensor d = d_term.view({t[0].size(0), -1});
    if (needs[1]) result[1] = at::mm(d, hidden_weight);
    if (needs[3]) result[3] = at::mm(d.t(), hidden);
    if (needs[4]) result[4] = d.sum(0);
    return result;
  }
};

std::optional<std::tuple<Tensor, Tensor>> try_spatial_attention(const LayerCall& a) {
  PlainCall call(a.features);
  if (!call.ok() || a.features.dim() != 4 || a.features.numel() == 0 || a.hidden.dim() != 2 ||
      a.score.dim() != 4)
    return std::nullopt;
  const int64_t n = a.features.size(0), size = a.hidden.size(1),
                terms = a.score.size(0) * a.features.size(2) * a.features.size(3);
  call(a.hidden, {n, size});
  call(a.score, {a.score.size(0), a.features.size(1), 1, 1});
  call(a.hidden_weight, {terms, size});
  call(a.hidden_bias, {terms});
  if (!call.ok()) return std::nullopt;
  const std::array<Tensor, Layer::inputs> tensors{a.features, a.hidden, a.score, a.hidden_weight,
                                                  a.hidden_bias};
  const variable_list out = run_eager<Layer>(tensors, a.options, call.recorded()).outputs;
  return std::make_tuple(out[0], out[1]);
}

}  // namespace

FUSEDNN_BINDINGS(cpu) { shortcut(m, "try_spatial_attention", &try_spatial_attention); }

}  // namespace fusednn
