// A call's tensors, checked for kernels of any device; formulas in fusednn/attention/reference.py.
#pragma once

#include "attention/bindings/calls.h"
#include "attention/philox.h"
#include "core/bindings/tensor_checks.h"

namespace fusednn {

class CheckedAttention : public CheckedArguments {
 public:
  int64_t batch, heads, groups, rows, columns, size, value_size;  // [B, H, L, D], [B, G, S, D], [B, G, S, V]
  int64_t extra = 0;
  OptionalTensor extra_key, extra_value, alibi_slopes, cu_seqlens_q, cu_seqlens_k;  // dense
  bool dropout = false;
  uint32_t dropout_threshold = 0;
  double dropout_scale = 1;

  bool packed() const { return cu_seqlens_q.has_value(); }

 protected:
  CheckedAttention(const char* op, const calls::AttentionTensors& a, const calls::AttentionOptions& options)
      : CheckedArguments(op, "query", a.query) {
    const at::Tensor &q = a.query, &k = a.key, &v = a.value;
    TORCH_CHECK(q.dim() == 4, op, ": query: got shape ", q.sizes(), ", expected [B, H, L, D]");
    TORCH_CHECK(k.dim() == 4 && v.dim() == 4, op, ": key, value: got shapes ", k.sizes(), " and ", v.sizes(),
                ", expected [B, G, S, D] and [B, G, S, V]");
    batch = q.size(0), heads = q.size(1), rows = q.size(2), size = q.size(3);
    groups = k.size(1), columns = k.size(2), value_size = v.size(3);
    TORCH_CHECK(groups > 0 ? heads % groups == 0 : heads == 0, op, ": query: got ", heads,
                " heads, expected a multiple of the key's ", groups);
    check("key", k, {batch, groups, columns, size});
    check("value", v, {batch, groups, columns, value_size});
    check_masks(a.mask, a.key_mask);
    TORCH_CHECK(a.extra_key.has_value() == a.extra_value.has_value(), op,
                ": extra_key, extra_value: expected both or neither");
    if (a.extra_key) extra = a.extra_key->dim() == 3 ? a.extra_key->size(1) : 0;
    extra_key = dense("extra_key", a.extra_key, {groups, extra, size});
    extra_value = dense("extra_value", a.extra_value, {groups, extra, value_size});
    check("alibi_slopes", a.alibi_slopes, {heads}, at::kFloat);
    alibi_slopes = fusednn::dense(a.alibi_slopes);
    set_lengths(a);
    set_dropout(a.dropout_seed, options.dropout_p);
    const std::string& kind = options.weights;
    TORCH_CHECK_VALUE(kind == "none" || kind == "mean" || kind == "heads", op, ": weights: got '", kind,
                      "', expected 'none', 'mean' or 'heads'");
    TORCH_CHECK(kind == "none" || !packed(), op, ": weights: got '", kind,
                "', expected 'none' for packed sequences");
  }

 private:
  void check_masks(const OptionalTensor& mask, const OptionalTensor& key_mask) const {
    const int64_t sizes[] = {batch, heads, rows, columns};
    bool fits = !mask || mask->dim() == 4;
    for (int i = 0; mask && fits && i < 4; ++i) fits = mask->size(i) == 1 || mask->size(i) == sizes[i];
    TORCH_CHECK(fits, op(), ": mask: got shape ", mask->sizes(), ", expected sizes of 1 or those of ",
                at::IntArrayRef(sizes));
    const auto added = [&](const char* name, const OptionalTensor& t, at::IntArrayRef wanted) {
      if (!t) return;
      TORCH_CHECK(t->scalar_type() == at::kBool || t->scalar_type() == storage(), op(), ": ", name, ": got ",
                  t->scalar_type(), ", expected Bool or ", storage(), " as query");
      check(name, *t, wanted, t->scalar_type());
    };
    added("mask", mask, mask ? mask->sizes() : at::IntArrayRef());
    added("key_mask", key_mask, {batch, columns});
  }

  void set_lengths(const calls::AttentionTensors& a) {
    const OptionalTensor &of_queries = a.cu_seqlens_q, &of_keys = a.cu_seqlens_k;
    TORCH_CHECK(of_queries.has_value() == of_keys.has_value(), op(),
                ": cu_seqlens_q, cu_seqlens_k: expected both or neither");
    if (!of_queries) return;
    TORCH_CHECK(batch == 1, op(), ": query: got ", batch, " samples, expected 1 with cu_seqlens");
    TORCH_CHECK(!a.mask && !a.key_mask && !extra, op(),
                ": mask, key_mask, extra_key: expected None with cu_seqlens");
    TORCH_CHECK(of_queries->dim() == 1 && of_queries->size(0) > 0, op(), ": cu_seqlens_q: got shape ",
                of_queries->sizes(), ", expected [N + 1]");
    check("cu_seqlens_q", of_queries, of_queries->sizes(), at::kInt);
    check("cu_seqlens_k", of_keys, of_queries->sizes(), at::kInt);
    cu_seqlens_q = of_queries->contiguous(), cu_seqlens_k = of_keys->contiguous();
  }

  void set_dropout(const OptionalTensor& seed, double p) {
    TORCH_CHECK(p >= 0 && p <= 1, op(), ": dropout_p: got ", p, ", expected 0 to 1");
    if (p == 0) return;
    TORCH_CHECK(seed && seed->numel() == 1, op(), ": dropout_seed: expected one number");
    check("dropout_seed", *seed, seed->sizes(), at::kLong);
    dropout = true;
    dropout_threshold = math::dropout_threshold(p), dropout_scale = math::dropout_scale(p);
  }
};

}  // namespace fusednn
