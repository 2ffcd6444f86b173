// The eager shortcut of MultiheadAttention on CPU tensors (core/bindings/eager.h): self-attention without
// masks but that of padding, with both projections. The gradients of query, key and value are written where
// the gradient of the packed projection wants them.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>

#include "attention/bindings/cpu.h"
#include "core/bindings/eager.h"

namespace fusednn {
namespace {

using at::Tensor;

struct LayerOptions {
  int64_t heads;
  bool batch_first;
  std::string weights;
  int64_t fewest_rows;  // of our projections; below, torch's are faster
  FUSEDNN_ARGUMENTS(heads, batch_first, weights, fewest_rows)
};

struct LayerCall {
  Tensor input, in_weight;  // [B, L, E] or [L, B, E]; [3 E, E]
  OptionalTensor in_bias;   // [3 E]
  Tensor out_weight;        // [E, E]
  OptionalTensor out_bias;  // [E]
  OptionalTensor padding;   // [B, L]; bool: True is ignored; or added
  LayerOptions options;
  FUSEDNN_ARGUMENTS(input, in_weight, in_bias, out_weight, out_bias, padding, options)
};

Tensor rows(const Tensor& t) { return t.view({-1, t.size(-1)}); }

// The layout of one call.
struct Heads {
  int64_t first, second, heads;
  bool batch_first;

  Heads(const Tensor& input, const LayerOptions& o)
      : first(input.size(0)), second(input.size(1)), heads(o.heads), batch_first(o.batch_first) {}
  // [rows, n E] as n tensors [B, H, L, D].
  Tensor one(const Tensor& t, int64_t n, int64_t which) const {
    const Tensor split = t.view({first, second, n, heads, -1}).select(2, which);
    return batch_first ? split.permute({0, 2, 1, 3}) : split.permute({1, 2, 0, 3});
  }
  std::array<Tensor, 3> three(const Tensor& t) const { return {one(t, 3, 0), one(t, 3, 1), one(t, 3, 2)}; }
};

bool ours(const Tensor& x, const LayerOptions& o) {
  return x.scalar_type() == at::kFloat && x.size(0) >= o.fewest_rows;
}

Tensor project(const LayerOptions& o, const Tensor& x, const Tensor& weight, const Tensor& bias) {
  return ours(x, o) ? projection_forward({x, weight, optional(bias)}) : at::linear(x, weight, optional(bias));
}

struct ProjectionGradients {
  Tensor input, weight, bias;
};

ProjectionGradients project_backward(const LayerOptions& o, const Tensor& grad, const Tensor& x,
                                     const Tensor& weight, const std::array<bool, 3>& needs) {
  ProjectionGradients g;
  if (ours(x, o)) {
    std::tie(g.input, g.weight, g.bias) = projection_backward({grad, x, weight, needs});
    return g;
  }
  if (needs[0]) g.input = at::mm(grad, weight);
  if (needs[1]) g.weight = at::mm(grad.t(), x);
  if (needs[2]) g.bias = grad.sum(0);
  return g;
}

struct Layer {
  static constexpr const char* name = "multihead_attention_layer";
  static constexpr size_t inputs = 6;  // the last is the padding, true takes part
  using Options = LayerOptions;

  static EagerResults forward(at::TensorList t, const Options& o, bool save) {
    const Heads split(t[0], o);
    const Tensor heads = project(o, rows(t[0].contiguous()), t[1], t[2]);  // [M, 3 E]
    const Tensor attended = at::empty({heads.size(0), t[0].size(2)}, heads.options());
    const auto [_, lse, weights] = self_attention_forward(split.three(heads), optional(t[5]), o.weights,
                                                          split.one(attended, 1, 0), save);
    const Tensor result = project(o, attended, t[3], t[4]).view(t[0].sizes());
    EagerResults r{{result, weights}};
    if (save) r.saved = {heads, attended, lse};
    if (o.weights == "none") r.not_differentiable = {weights};
    return r;
  }

  static std::array<Tensor, inputs> backward(at::TensorList t, at::TensorList saved,
                                             const variable_list& grads,
                                             const std::array<bool, inputs>& needs, const Options& o) {
    const Heads split(t[0], o);
    const Tensor &heads = saved[0], &attended = saved[1], &lse = saved[2];
    std::array<Tensor, inputs> result;
    const bool into_heads = needs[0] || needs[1] || needs[2];
    OptionalTensor d_attended;
    if (grads[0].defined()) {
      const auto out =
          project_backward(o, rows(grads[0].contiguous()), attended, t[3], {into_heads, needs[3], needs[4]});
      result[3] = out.weight, result[4] = out.bias;
      if (into_heads) d_attended = split.one(out.input, 1, 0);
    }
    if (!into_heads) return result;
    const Tensor d_heads = at::empty_like(heads);
    const OptionalTensor d_weights = dense(optional(grads[1]));
    self_attention_backward(d_attended, d_weights, split.three(heads), optional(t[5]), o.weights,
                            split.one(attended, 1, 0), lse, split.three(d_heads));
    const auto in =
        project_backward(o, d_heads, rows(t[0].contiguous()), t[1], {needs[0], needs[1], needs[2]});
    if (needs[0]) result[0] = in.input.view(t[0].sizes());
    result[1] = in.weight, result[2] = in.bias;
    return result;
  }
};

bool plain_padding(const LayerCall& a) {
  if (!a.padding) return true;
  const Tensor &p = *a.padding, &x = a.input;
  const bool kind = p.scalar_type() == at::kBool || p.scalar_type() == x.scalar_type();
  const int64_t batch = x.size(a.options.batch_first ? 0 : 1), length = x.size(a.options.batch_first ? 1 : 0);
  return plain(p) && kind && !p.requires_grad() && p.sizes() == at::IntArrayRef({batch, length});
}

std::optional<std::tuple<Tensor, Tensor>> try_multihead_attention(const LayerCall& a) {
  const Tensor& x = a.input;
  PlainCall call(x);
  if (!call.ok() || x.dim() != 3 || x.numel() == 0) return std::nullopt;
  const int64_t e = x.size(2);
  call(a.in_weight, {3 * e, e});
  call(a.in_bias, {3 * e});
  call(a.out_weight, {e, e});
  call(a.out_bias, {e});
  if (!call.ok() || e % a.options.heads != 0 || !plain_padding(a)) return std::nullopt;
  Tensor mask = or_undefined(a.padding);
  if (mask.defined() && mask.scalar_type() == at::kBool) mask = mask.logical_not();
  const std::array<Tensor, Layer::inputs> tensors{
      x, a.in_weight, or_undefined(a.in_bias), a.out_weight, or_undefined(a.out_bias), mask};
  const variable_list out = run_eager<Layer>(tensors, a.options, call.recorded()).outputs;
  return std::make_tuple(out[0], out[1]);
}

}  // namespace

FUSEDNN_BINDINGS(cpu) { shortcut(m, "try_multihead_attention", &try_multihead_attention); }

}  // namespace fusednn
