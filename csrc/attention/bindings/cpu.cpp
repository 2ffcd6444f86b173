// fusednn._C.cpu: attention on CPU tensors; schemas as in fusednn/attention/ops.py.
#include "attention/bindings/cpu.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>

#include "attention/bindings/checked.h"
#include "attention/cpu/params.h"
#include "core/bindings/cpu_kernel.h"
#include "core/bindings/op.h"

namespace fusednn {

using at::Tensor;
using cpu::Attention;
using cpu::HeadRows;
using cpu::HeadRowsOut;
using cpu::ReturnedWeights;

namespace {

HeadRows rows_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }
HeadRowsOut out_rows_of(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// [B, heads, rows, size], laid out as [B, rows, heads, size].
Tensor empty_by_rows(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t size) {
  return at::empty({batch, rows, heads, size}, like.options()).transpose(1, 2);
}

ReturnedWeights weights_named(const std::string& name) {
  if (name == "none") return ReturnedWeights::none;
  if (name == "mean") return ReturnedWeights::mean;
  return ReturnedWeights::heads;
}

cpu::Mask mask_of(const OptionalTensor& t) {
  cpu::Mask mask;
  if (!t) return mask;
  const auto stride = [&](int64_t i) { return t->size(i) == 1 ? 0 : t->stride(i); };
  mask.data = t->const_data_ptr();
  mask.is_bool = t->scalar_type() == at::kBool;
  mask.batch_stride = stride(0);
  if (t->dim() == 4) mask.head_stride = stride(1), mask.row_stride = stride(2);
  mask.column_stride = stride(t->dim() - 1);
  return mask;
}

// The longest of sequences that end at `total`.
int64_t longest_of(const Tensor& t, const char* name, int64_t total) {
  const int32_t* bounds = t.const_data_ptr<int32_t>();
  const int64_t sequences = t.size(0) - 1;
  TORCH_CHECK(bounds[0] == 0 && bounds[sequences] == total && std::is_sorted(bounds, bounds + sequences + 1),
              name, ": expected numbers that ascend from 0 to ", total);
  int64_t longest = 0;
  for (int64_t i = 0; i < sequences; ++i) longest = std::max<int64_t>(longest, bounds[i + 1] - bounds[i]);
  return longest;
}

// A call's tensors, checked, and their description.
struct CheckedCall : CheckedAttention {
  Tensor query, key, value;
  Attention call{};

  CheckedCall(const char* op, const calls::AttentionTensors& a, const calls::AttentionOptions& options)
      : CheckedAttention(op, a, options) {
    check_on_cpu(*this);
    query = with_dense_rows(a.query), key = with_dense_rows(a.key), value = with_dense_rows(a.value);
    call.dtype = dtype();
    call.batch = call.sequences = batch, call.heads = heads, call.groups = groups;
    call.rows = rows, call.columns = columns, call.size = size, call.value_size = value_size;
    call.query = rows_of(query), call.key = rows_of(key), call.value = rows_of(value);
    call.mask = mask_of(a.mask), call.key_mask = mask_of(a.key_mask);
    call.extra = extra;
    call.extra_key = data_or_null(extra_key), call.extra_value = data_or_null(extra_value);
    if (alibi_slopes) call.alibi_slopes = alibi_slopes->const_data_ptr<float>();
    if (packed()) {
      call.longest_q = longest_of(*cu_seqlens_q, "cu_seqlens_q", rows);
      call.longest_k = longest_of(*cu_seqlens_k, "cu_seqlens_k", columns);
      call.sequences = cu_seqlens_q->size(0) - 1;
      call.cu_seqlens_q = cu_seqlens_q->const_data_ptr<int32_t>();
      call.cu_seqlens_k = cu_seqlens_k->const_data_ptr<int32_t>();
    }
    call.scale = options.scale, call.softcap = options.softcap;
    call.window_left = options.window_left, call.window_right = options.window_right;
    call.position_offset = options.position_offset;
    call.dropout = dropout;
    call.dropout_threshold = dropout_threshold, call.dropout_scale = dropout_scale;
    if (dropout) call.dropout_seed = static_cast<uint64_t>(a.dropout_seed->item<int64_t>());
  }
};

bool empty(const Attention& c) { return c.batch * c.heads * c.rows == 0 || c.sequences == 0; }

at::DimVector weights_sizes(const Attention& c, ReturnedWeights returned) {
  const int64_t columns = c.columns + c.extra;
  if (returned == ReturnedWeights::none) return {0};
  if (returned == ReturnedWeights::mean) return {c.batch, c.rows, columns};
  return {c.batch, c.heads, c.rows, columns};
}

AttentionResult run_forward(const Attention& c, const Tensor& like, const std::string& weights,
                            const Tensor& output, bool with_lse = true) {
  cpu::AttentionForward p{};
  p.call = c;
  p.returned = weights_named(weights);
  Tensor lse;
  if (with_lse) lse = at::empty({c.batch, c.heads, c.rows}, like.options().dtype(wide_dtype(like)));
  const Tensor found = at::empty(weights_sizes(c, p.returned), like.options());
  if (empty(c)) {
    if (found.numel()) found.zero_();  // the mean of no heads
    return {output, lse, found};
  }
  p.output = out_rows_of(output);
  p.lse = mutable_data_or_null(lse);
  p.weights = mutable_data_or_null(found);
  const auto& kernels = cpu::kernels<cpu::AttentionKernels>();
  run_kernel(kernels.forward_workspace, kernels.forward, p);
  return {output, lse, found};
}

AttentionResult attention_forward(const calls::AttentionForward& a) {
  const CheckedCall t("attention_forward", a.tensors, a.options);
  const Attention& c = t.call;
  const Tensor& query = a.tensors.query;
  return run_forward(c, query, a.options.weights,
                     empty_by_rows(query, c.batch, c.heads, c.rows, c.value_size));
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_backward(const calls::AttentionBackward& a) {
  const auto& [query, key, value, mask, key_mask, extra_key, extra_value, alibi, bounds_q, bounds_k, seed] =
      a.tensors;
  const auto& output_mask = a.output_mask;
  const CheckedCall t("attention_backward", a.tensors, a.options);
  const Attention& c = t.call;
  const at::DimVector output_sizes{c.batch, c.heads, c.rows, c.value_size},
      lse_sizes{c.batch, c.heads, c.rows};
  t.check("output", a.output, output_sizes);
  t.check("grad_output", a.grad_output, output_sizes);
  t.check("lse", a.lse, lse_sizes, t.wide());
  t.check("grad_lse", a.grad_lse, lse_sizes, t.wide());

  cpu::AttentionBackward p{};
  p.call = c;
  p.returned = weights_named(a.options.weights);
  const Tensor outputs = with_dense_rows(a.output), sums = a.lse.contiguous();
  OptionalTensor grads, weight_grads;
  if (a.grad_output) grads = with_dense_rows(*a.grad_output);
  const OptionalTensor sum_grads = dense(a.grad_lse);
  if (p.returned != ReturnedWeights::none) {
    weight_grads = t.dense("grad_weights", a.grad_weights, weights_sizes(c, p.returned));
  }
  const std::array<OptionalTensor, 7> like{query, key, value, mask, key_mask, extra_key, extra_value};
  // The layout of its tensor, as torch's gradients have; what a kernel can't write so is copied there at the
  // end.
  std::array<Tensor, 7> found, written;
  for (int i = 0; i < 7; ++i) {
    found[i] = output_mask[i] ? Tensor() : at::empty({0}, query.options());
    if (!output_mask[i]) continue;
    TORCH_CHECK(like[i] && like[i]->scalar_type() == t.storage(), "output_mask: got a gradient of argument ",
                i, " asked for, which has none");
    found[i] = at::empty_like(*like[i]);
    const bool dense = i < 3 ? found[i].size(-1) <= 1 || found[i].stride(-1) == 1 : found[i].is_contiguous();
    written[i] = dense ? found[i] : at::empty(found[i].sizes(), found[i].options());
  }
  if (empty(c)) {
    for (Tensor& f : found) f.zero_();
    return std::tuple_cat(found);
  }
  p.output = rows_of(outputs);
  if (grads) p.grad_output = rows_of(*grads);
  p.lse = sums.const_data_ptr();
  p.grad_lse = data_or_null(sum_grads);
  p.grad_weights = data_or_null(weight_grads);
  const auto rows_out = [&](int i) { return output_mask[i] ? out_rows_of(written[i]) : HeadRowsOut{}; };
  p.grad_query = rows_out(0), p.grad_key = rows_out(1), p.grad_value = rows_out(2);
  p.grad_mask = mutable_data_or_null(written[3]), p.grad_key_mask = mutable_data_or_null(written[4]);
  p.grad_extra_key = mutable_data_or_null(written[5]), p.grad_extra_value = mutable_data_or_null(written[6]);
  for (int64_t i = 0; mask && i < 4; ++i) p.mask_sizes[i] = mask->size(i);
  const auto& kernels = cpu::kernels<cpu::AttentionKernels>();
  run_kernel(kernels.backward_workspace, kernels.backward, p);
  for (int i = 0; i < 7; ++i)
    if (output_mask[i] && !written[i].is_same(found[i])) found[i].copy_(written[i]);
  return std::tuple_cat(found);
}

// A plain call on parts of one tensor, which the caller made.
Attention layer_call(const std::array<Tensor, 3>& heads, const OptionalTensor& key_mask) {
  const Tensor &q = heads[0], &k = heads[1], &v = heads[2];
  Attention c{};
  c.dtype = dtype_of(q, "query");
  c.batch = c.sequences = q.size(0);
  c.heads = c.groups = q.size(1);
  c.rows = c.columns = q.size(2);
  c.size = c.value_size = q.size(3);
  c.query = rows_of(q), c.key = rows_of(k), c.value = rows_of(v);
  c.key_mask = mask_of(key_mask);
  c.scale = 1 / std::sqrt(static_cast<double>(std::max<int64_t>(c.size, 1)));
  c.window_left = c.window_right = -1;
  return c;
}

}  // namespace

AttentionResult self_attention_forward(const std::array<Tensor, 3>& heads, const OptionalTensor& key_mask,
                                       const std::string& weights, const Tensor& output, bool with_lse) {
  return run_forward(layer_call(heads, key_mask), heads[0], weights, output, with_lse);
}

void self_attention_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_weights,
                             const std::array<Tensor, 3>& heads, const OptionalTensor& key_mask,
                             const std::string& weights, const Tensor& output, const Tensor& lse,
                             const std::array<Tensor, 3>& grads) {
  cpu::AttentionBackward p{};
  p.call = layer_call(heads, key_mask);
  p.returned = weights_named(weights);
  if (grad_output) p.grad_output = rows_of(*grad_output);
  p.output = rows_of(output);
  p.lse = lse.const_data_ptr();
  p.grad_weights = data_or_null(grad_weights);
  p.grad_query = out_rows_of(grads[0]), p.grad_key = out_rows_of(grads[1]),
  p.grad_value = out_rows_of(grads[2]);
  const auto& kernels = cpu::kernels<cpu::AttentionKernels>();
  run_kernel(kernels.backward_workspace, kernels.backward, p);
}

FUSEDNN_BINDINGS(cpu) {
  op(m, "attention_forward", &attention_forward);
  op(m, "attention_backward", &attention_backward);
}

}  // namespace fusednn
