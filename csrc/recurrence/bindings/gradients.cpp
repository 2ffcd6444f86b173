#include "recurrence/bindings/gradients.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/xlogy.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace fusednn {
namespace {

using at::Tensor;

// Frames [F, C, P] with ended ones zeroed: their gradients are 0, and 0 times what they hold may not be.
Tensor counted_frames(const AttentionLstmSteps& s) {
  if (!s.lengths) return s.frames;
  const Tensor ended = at::arange(s.features.size(1), s.lengths->options()).ge(s.lengths->unsqueeze(1));
  return s.frames.masked_fill(ended.reshape({-1, 1, 1}), 0);
}

// d [M, R] times the weight's other operand [M, N], summed over M: [R, N].
Tensor over_rows(const Tensor& d, const Tensor& operand) {
  return at::mm(d.flatten(0, -2).t(), operand.flatten(0, -2));
}

Tensor frame_gradient(const AttentionLstmSteps& s) {
  const int64_t frames = s.map.size(0), C = s.features.size(2), P = s.map.size(2);
  Tensor attended = s.d_attended.defined() ? s.d_attended : at::mm(s.d_x.flatten(0, 1), s.weight_ih);
  attended = attended.view({frames, C, s.flatten ? P : 1});
  Tensor grad = s.flatten ? attended.mul_(s.map) : attended.mul(s.map);  // [F, C, P]
  const int64_t rows = s.score_weight.size(0);
  grad.baddbmm_(s.score_weight.t().expand({frames, C, rows}), s.d_products.view({frames, rows, P}));
  const auto format = s.features.select(1, 0).suggest_memory_format();
  return grad.to(s.features.scalar_type())
      .view({frames, C, s.features.size(3), s.features.size(4)})
      .contiguous(format)
      .view(s.features.sizes());
}

// -sum(d z log map) / T, with the map's largest as the unit of the logarithm (formulas.temperature_gradient).
Tensor temperature_gradient(const AttentionLstmSteps& s) {
  const Tensor largest = s.map.amax(-1, true);
  const Tensor unit = s.map / largest.masked_fill(largest.eq(0), 1);
  return (at::xlogy(s.d_scaled.view(s.map.sizes()), unit).sum().neg() / s.temperature)
      .reshape(s.learned->sizes());
}

}  // namespace

std::vector<Tensor> attention_lstm_gradients(const AttentionLstmSteps& s, const AttentionLstmWanted& wanted) {
  // Autocast chose the dtypes of the op's arguments; here it has no more say.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  TORCH_CHECK(!wanted[6] || s.d_v.defined(), "output_mask: got True for v, which is None");
  TORCH_CHECK(!wanted[7] || s.learned, "output_mask: got True for the temperature, which is not learned");
  const int64_t frames = s.map.size(0), P = s.map.size(2), T = s.hidden.size(1);
  const Tensor f = wanted[3] || wanted[8] ? counted_frames(s) : Tensor();
  const Tensor h_prev =
      wanted[4] || wanted[9] ? at::cat({s.h0.unsqueeze(1), s.hidden.slice(1, 0, T - 1)}, 1) : Tensor();
  std::array<Tensor, kAttentionLstmGradients> g;
  if (wanted[3]) {
    const Tensor products = s.d_products.view({frames, s.score_weight.size(0), P});
    g[3] = at::bmm(products, f.transpose(1, 2)).sum(0);
  }
  if (wanted[4]) g[4] = over_rows(s.d_terms, h_prev);
  if (wanted[5]) g[5] = s.d_terms.sum({0, 1});
  if (wanted[6]) g[6] = s.d_v.sum(0, true);
  if (wanted[7]) g[7] = temperature_gradient(s);
  if (wanted[8]) {
    const Tensor attended =
        s.flatten ? f.mul(s.map).flatten(1) : at::bmm(f, s.map.transpose(1, 2)).squeeze(2);
    g[8] = over_rows(s.d_x, attended);
  }
  if (wanted[9]) g[9] = over_rows(s.d_r, h_prev);
  if (wanted[10]) g[10] = s.d_x.sum({0, 1});
  if (wanted[11]) g[11] = s.d_r.sum({0, 1});
  if (wanted[0]) g[0] = frame_gradient(s);
  if (wanted[1]) g[1] = s.d_h;
  if (wanted[2]) g[2] = s.d_c;
  if (wanted[7]) g[7] = g[7].to(s.learned->scalar_type());
  std::vector<Tensor> found;
  for (int i = 0; i < kAttentionLstmGradients; ++i) {
    const Tensor& t = g[i];
    found.push_back(!t.defined() ? at::empty({0}, s.features.options())
                    : i == 7     ? t
                                 : t.to(s.features.scalar_type()));
  }
  return found;
}

}  // namespace fusednn
