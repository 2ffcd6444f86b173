// fusednn._C.cpu: attention on CPU tensors; schemas as in fusednn/attention/ops.py.
#include "attention/bindings/cpu.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>

#include "attention/cpu/params.h"
#include "attention/philox.h"
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
  TORCH_CHECK_VALUE(name == "heads", "weights: got '", name, "', expected 'none', 'mean' or 'heads'");
  return ReturnedWeights::heads;
}

cpu::Mask mask_of(const OptionalTensor& t, const char* name, at::IntArrayRef sizes, at::ScalarType type) {
  cpu::Mask mask;
  if (!t) return mask;
  TORCH_CHECK(t->device().is_cpu(), name, ": got a tensor on ", t->device(), ", expected cpu");
  TORCH_CHECK(t->scalar_type() == at::kBool || t->scalar_type() == type, name, ": got ", t->scalar_type(),
              ", expected Bool or ", type);
  bool fits = t->dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) fits = t->size(i) == sizes[i] || t->size(i) == 1;
  TORCH_CHECK(fits, name, ": got shape ", t->sizes(), ", expected ", sizes, " or sizes of 1");
  const auto stride = [&](int64_t i) { return t->size(i) == 1 ? 0 : t->stride(i); };
  mask.data = t->const_data_ptr();
  mask.is_bool = t->scalar_type() == at::kBool;
  mask.batch_stride = stride(0);
  if (t->dim() == 4) mask.head_stride = stride(1), mask.row_stride = stride(2);
  mask.column_stride = stride(t->dim() - 1);
  return mask;
}

// Checks cu_seqlens that end at `total`; the longest sequence.
int64_t longest_of(const Tensor& t, const char* name, int64_t total) {
  TORCH_CHECK(t.device().is_cpu() && t.dim() == 1 && t.scalar_type() == at::kInt && t.size(0) > 0, name,
              ": got ", t.scalar_type(), " of shape ", t.sizes(), ", expected Int of [N + 1] on cpu");
  const int32_t* bounds = t.const_data_ptr<int32_t>();
  const int64_t sequences = t.size(0) - 1;
  TORCH_CHECK(bounds[0] == 0 && bounds[sequences] == total && std::is_sorted(bounds, bounds + sequences + 1),
              name, ": expected numbers that ascend from 0 to ", total);
  int64_t longest = 0;
  for (int64_t i = 0; i < sequences; ++i) longest = std::max<int64_t>(longest, bounds[i + 1] - bounds[i]);
  return longest;
}

// A call's tensors, checked, and their description.
struct CheckedCall {
  Tensor query, key, value, cu_seqlens_q, cu_seqlens_k;
  OptionalTensor mask, key_mask, extra_key, extra_value, alibi_slopes;
  Attention call{};

  CheckedCall(const calls::AttentionTensors& a, const calls::AttentionOptions& options)
      : mask(a.mask), key_mask(a.key_mask) {
    const Tensor &q = a.query, &k = a.key, &v = a.value;
    const auto type = q.scalar_type();
    call.dtype = dtype_of(q, "query");
    TORCH_CHECK(q.dim() == 4 && q.device().is_cpu(), "query: got shape ", q.sizes(), " on ", q.device(),
                ", expected [B, H, L, D] on cpu");
    TORCH_CHECK(k.dim() == 4, "key: got shape ", k.sizes(), ", expected [B, G, S, D]");
    TORCH_CHECK(v.dim() == 4, "value: got shape ", v.sizes(), ", expected [B, G, S, V]");
    call.batch = q.size(0), call.heads = q.size(1), call.rows = q.size(2), call.size = q.size(3);
    call.groups = k.size(1), call.columns = k.size(2), call.value_size = v.size(3);
    check(k, "key", {call.batch, call.groups, call.columns, call.size}, type);
    check(v, "value", {call.batch, call.groups, call.columns, call.value_size}, type);
    TORCH_CHECK(call.heads == call.groups || (call.groups > 0 && call.heads % call.groups == 0), "key: got ",
                call.groups, " heads, expected a divisor of query's ", call.heads);
    query = with_dense_rows(q), key = with_dense_rows(k), value = with_dense_rows(v);
    call.query = rows_of(query), call.key = rows_of(key), call.value = rows_of(value);

    call.mask = mask_of(mask, "mask", {call.batch, call.heads, call.rows, call.columns}, type);
    if (key_mask) check(*key_mask, "key_mask", {call.batch, call.columns}, key_mask->scalar_type());
    call.key_mask = mask_of(key_mask, "key_mask", {call.batch, call.columns}, type);
    set_extra(a.extra_key, a.extra_value, type);
    if (a.alibi_slopes) {
      check(*a.alibi_slopes, "alibi_slopes", {call.heads}, at::kFloat);
      alibi_slopes = a.alibi_slopes->contiguous();
      call.alibi_slopes = alibi_slopes->const_data_ptr<float>();
    }
    call.sequences = call.batch;
    TORCH_CHECK(a.cu_seqlens_q.has_value() == a.cu_seqlens_k.has_value(),
                "cu_seqlens_q, cu_seqlens_k: expected both or neither");
    if (a.cu_seqlens_q) set_bounds(*a.cu_seqlens_q, *a.cu_seqlens_k);
    call.scale = options.scale, call.softcap = options.softcap;
    call.window_left = options.window_left, call.window_right = options.window_right;
    call.position_offset = options.position_offset;
    set_dropout(a.dropout_seed, options.dropout_p);
  }

 private:
  void set_extra(const OptionalTensor& k, const OptionalTensor& v, at::ScalarType type) {
    TORCH_CHECK(k.has_value() == v.has_value(), "extra_key, extra_value: expected both or neither");
    if (!k) return;
    call.extra = k->dim() == 3 ? k->size(1) : 0;
    check(*k, "extra_key", {call.groups, call.extra, call.size}, type);
    check(*v, "extra_value", {call.groups, call.extra, call.value_size}, type);
    extra_key = k->contiguous(), extra_value = v->contiguous();
    call.extra_key = extra_key->const_data_ptr(), call.extra_value = extra_value->const_data_ptr();
  }

  void set_bounds(const Tensor& q, const Tensor& k) {
    TORCH_CHECK(call.batch == 1 && !mask && !key_mask && !extra_key,
                "cu_seqlens_q: packed sequences come as one sample, without masks and extra columns");
    cu_seqlens_q = q.contiguous(), cu_seqlens_k = k.contiguous();
    call.longest_q = longest_of(cu_seqlens_q, "cu_seqlens_q", call.rows);
    call.longest_k = longest_of(cu_seqlens_k, "cu_seqlens_k", call.columns);
    TORCH_CHECK(q.size(0) == k.size(0), "cu_seqlens_k: got ", k.sizes(), ", expected ", q.sizes());
    call.sequences = q.size(0) - 1;
    call.cu_seqlens_q = cu_seqlens_q.const_data_ptr<int32_t>();
    call.cu_seqlens_k = cu_seqlens_k.const_data_ptr<int32_t>();
  }

  void set_dropout(const OptionalTensor& seed, double p) {
    if (!seed || p <= 0) return;
    TORCH_CHECK(seed->numel() == 1 && seed->scalar_type() == at::kLong && seed->device().is_cpu(),
                "dropout_seed: got ", seed->scalar_type(), " of shape ", seed->sizes(),
                ", expected one Long on cpu");
    call.dropout = true;
    call.dropout_threshold = math::dropout_threshold(p), call.dropout_scale = math::dropout_scale(p);
    call.dropout_seed = static_cast<uint64_t>(seed->item<int64_t>());
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
  TORCH_CHECK(p.returned == ReturnedWeights::none || !c.cu_seqlens_q, "weights: got '", weights,
              "', expected 'none' for packed sequences");
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
  const CheckedCall t(a.tensors, a.options);
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
  const CheckedCall t(a.tensors, a.options);
  const Attention& c = t.call;
  const auto type = query.scalar_type();
  const at::DimVector output_sizes{c.batch, c.heads, c.rows, c.value_size},
      lse_sizes{c.batch, c.heads, c.rows};
  check(a.output, "output", output_sizes, type);
  check(a.grad_output, "grad_output", output_sizes, type);
  check(a.lse, "lse", lse_sizes, wide_dtype(query));
  check(a.grad_lse, "grad_lse", lse_sizes, wide_dtype(query));

  cpu::AttentionBackward p{};
  p.call = c;
  p.returned = weights_named(a.options.weights);
  const Tensor outputs = with_dense_rows(a.output), sums = a.lse.contiguous();
  OptionalTensor grads, weight_grads;
  if (a.grad_output) grads = with_dense_rows(*a.grad_output);
  const OptionalTensor sum_grads = dense(a.grad_lse);
  if (p.returned != ReturnedWeights::none) {
    check(a.grad_weights, "grad_weights", weights_sizes(c, p.returned), type);
    weight_grads = dense(a.grad_weights);
  }
  const std::array<OptionalTensor, 7> like{query, key, value, mask, key_mask, extra_key, extra_value};
  // The layout of its tensor, as torch's gradients have; what a kernel can't write so is copied there at the
  // end.
  std::array<Tensor, 7> found, written;
  for (int i = 0; i < 7; ++i) {
    found[i] = output_mask[i] ? Tensor() : at::empty({0}, query.options());
    if (!output_mask[i]) continue;
    TORCH_CHECK(like[i] && like[i]->scalar_type() == type, "output_mask: got a gradient of argument ", i,
                " asked for, which has none");
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
  c.key_mask = mask_of(key_mask, "key_mask", {c.batch, c.columns}, q.scalar_type());
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
