// Python face of the CUDA launchers of attention; schema as in fusednn/attention/ops.py.
//
// Device-agnostic: the tensors' device decides the guard, current_stream the stream.
#include "attention/cuda/params.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "attention/bindings/calls.h"
#include "attention/philox.h"
#include "core/bindings/cuda_arguments.h"
#include "core/bindings/op.h"

namespace fusednn {
namespace {

using at::Tensor;
using cuda::attention::Call;
using cuda::attention::Operand;
using cuda::attention::Strides;

// Numbers of rows and columns are ints in the kernels, which go a few tiles beyond them.
constexpr int64_t kMostRows = std::numeric_limits<int>::max() - 1024;

// Elements from one entry to the next; 0 where there is one, which then serves all.
int64_t step(const Tensor& t, int dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

Strides strides_of(const Tensor& t) { return {step(t, 0), step(t, 1), step(t, 2), step(t, 3)}; }

Operand operand(const Tensor& t) {
  constexpr int64_t kBytes = 16;
  Operand x{t.const_data_ptr(), strides_of(t), false};
  // A stride of 0 would do for one column, but the kernels' packs have neighbours.
  x.strides.column = t.stride(3);
  const auto whole = [&](int64_t elements) { return elements * t.element_size() % kBytes == 0; };
  x.packs = reinterpret_cast<uintptr_t>(x.data) % kBytes == 0 && t.stride(3) == 1 && whole(t.size(3)) &&
            whole(x.strides.batch) && whole(x.strides.head) && whole(x.strides.row);
  return x;
}

// A call's tensors, checked.
class Attention : public CudaArguments {
 public:
  Attention(const char* op, const calls::AttentionForward& a) : CudaArguments(op, "query", a.tensors.query) {
    const Tensor &query = a.tensors.query, &key = a.tensors.key, &value = a.tensors.value;
    TORCH_CHECK(query.dim() == 4, op, ": query: got shape ", query.sizes(), ", expected [B, H, L, D]");
    TORCH_CHECK(key.dim() == 4 && value.dim() == 4, op, ": key, value: got shapes ", key.sizes(), " and ",
                value.sizes(), ", expected [B, G, S, D] and [B, G, S, V]");
    call_.dtype = dtype();
    call_.batch = query.size(0), call_.heads = small("heads", query.size(1));
    call_.queries = call_.total_queries = small("queries", query.size(2));
    call_.head_size = head_size("query", query.size(3));
    call_.key_heads = small("key heads", key.size(1));
    call_.keys = call_.total_keys = small("keys", key.size(2));
    call_.value_size = head_size("value", value.size(3));
    TORCH_CHECK(call_.key_heads > 0 ? call_.heads % call_.key_heads == 0 : call_.heads == 0, op,
                ": query: got ", call_.heads, " heads, expected a multiple of the key's ", call_.key_heads);
    same("key", key, {call_.batch, call_.key_heads, call_.keys, call_.head_size});
    same("value", value, {call_.batch, call_.key_heads, call_.keys, call_.value_size});
    call_.query = operand(query), call_.key = operand(key), call_.value = operand(value);
    set_masks(a.tensors.mask, a.tensors.key_mask);
    set_extra(a.tensors.extra_key, a.tensors.extra_value);
    set_alibi(a.tensors.alibi_slopes);
    set_scores(a.options);
    set_dropout(a.tensors.dropout_seed, a.options.dropout_p);
    set_lengths(a);
    check_weights(a.options.weights);
  }

  const Call& call() const { return call_; }
  bool packed() const { return call_.cu_seqlens_q != nullptr; }
  at::TensorOptions wide() const { return options().dtype(dtype() == DType::f64 ? at::kDouble : at::kFloat); }

 private:
  void set_masks(const OptionalTensor& mask, const OptionalTensor& key_mask) {
    if (mask) {
      const int64_t full[] = {call_.batch, call_.heads, call_.queries, call_.keys};
      bool fits = mask->dim() == 4;
      for (int i = 0; fits && i < 4; ++i) fits = mask->size(i) == 1 || mask->size(i) == full[i];
      TORCH_CHECK(fits, op(), ": mask: got shape ", mask->sizes(), ", expected sizes of 1 or those of ",
                  at::IntArrayRef(full));
      call_.mask_is_bool = is_bool("mask", *mask);
      call_.mask = mask->const_data_ptr();
      call_.mask_strides = strides_of(*mask);
    }
    if (key_mask) {
      shape("key_mask", *key_mask, {call_.batch, call_.keys});
      call_.key_mask_is_bool = is_bool("key_mask", *key_mask);
      call_.key_mask = key_mask->const_data_ptr();
      call_.key_mask_batch = step(*key_mask, 0), call_.key_mask_column = step(*key_mask, 1);
    }
  }

  void set_extra(const OptionalTensor& key, const OptionalTensor& value) {
    TORCH_CHECK(key.has_value() == value.has_value(), op(),
                ": extra_key, extra_value: expected both or neither");
    if (!key) return;
    TORCH_CHECK(key->dim() == 3 && key->size(1) <= cuda::attention::kMostExtra, op(),
                ": extra_key: got shape ", key->sizes(), ", expected [G, X, D] with X at most ",
                cuda::attention::kMostExtra);
    call_.extra = static_cast<int>(key->size(1));
    extra_key_ = dense("extra_key", *key, {call_.key_heads, call_.extra, call_.head_size});
    extra_value_ = dense("extra_value", *value, {call_.key_heads, call_.extra, call_.value_size});
    call_.extra_key = extra_key_.const_data_ptr(), call_.extra_value = extra_value_.const_data_ptr();
  }

  void set_alibi(const OptionalTensor& slopes) {
    if (!slopes) return;
    shape("alibi_slopes", *slopes, {call_.heads});
    type("alibi_slopes", *slopes, at::kFloat);
    slopes_ = slopes->contiguous();
    call_.alibi_slopes = slopes_.const_data_ptr<float>();
  }

  void set_lengths(const calls::AttentionForward& a) {
    const OptionalTensor &of_queries = a.tensors.cu_seqlens_q, &of_keys = a.tensors.cu_seqlens_k;
    TORCH_CHECK(of_queries.has_value() == of_keys.has_value(), op(),
                ": cu_seqlens_q, cu_seqlens_k: expected both or neither");
    if (!of_queries) return;
    TORCH_CHECK(call_.batch == 1, op(), ": query: got ", call_.batch, " samples, expected 1 with cu_seqlens");
    TORCH_CHECK(!call_.mask && !call_.key_mask && !call_.extra, op(),
                ": mask, key_mask, extra_key: expected None with cu_seqlens");
    TORCH_CHECK(of_queries->dim() == 1 && of_queries->size(0) > 0, op(), ": cu_seqlens_q: got shape ",
                of_queries->sizes(), ", expected [N + 1]");
    const Tensor* given[] = {&*of_queries, &*of_keys};
    for (const Tensor* t : given) {
      shape("cu_seqlens", *t, {of_queries->size(0)});
      type("cu_seqlens", *t, at::kInt);
    }
    of_queries_ = of_queries->contiguous(), of_keys_ = of_keys->contiguous();
    call_.cu_seqlens_q = of_queries_.const_data_ptr<int32_t>();
    call_.cu_seqlens_k = of_keys_.const_data_ptr<int32_t>();
    call_.batch = of_queries->size(0) - 1;
    call_.queries = small("max_seqlen_q", a.options.max_seqlen_q);
    call_.keys = small("max_seqlen_k", a.options.max_seqlen_k);
  }

  void set_dropout(const OptionalTensor& seed, double p) {
    TORCH_CHECK(p >= 0 && p <= 1, op(), ": dropout_p: got ", p, ", expected 0 to 1");
    if (p == 0) return;
    TORCH_CHECK(seed && seed->numel() == 1, op(), ": dropout_seed: expected one number");
    device("dropout_seed", *seed);
    type("dropout_seed", *seed, at::kLong);
    seed_ = *seed;
    call_.dropout_seed = seed_.const_data_ptr<int64_t>();
    call_.dropout_threshold = math::dropout_threshold(p), call_.dropout_scale = math::dropout_scale(p);
  }

  void set_scores(const calls::AttentionOptions& options) {
    constexpr int64_t kFar = int64_t{1} << 60;  // sums of a few don't overflow
    const int64_t offset = options.position_offset;
    TORCH_CHECK(offset > -kFar && offset < kFar, op(), ": position_offset: got ", offset);
    call_.scale = options.scale, call_.softcap = options.softcap, call_.position_offset = offset;
    call_.window_left = std::min(options.window_left, kFar);
    call_.window_right = std::min(options.window_right, kFar);
  }

  void check_weights(const std::string& kind) const {
    TORCH_CHECK_VALUE(kind == "none" || kind == "mean" || kind == "heads", op(), ": weights: got '", kind,
                      "', expected none, mean or heads");
    TORCH_CHECK(kind == "none" || !packed(), op(), ": weights: got '", kind,
                "', expected none with cu_seqlens");
  }

  int small(const char* name, int64_t value) const {
    TORCH_CHECK(value >= 0 && value <= kMostRows, op(), ": ", name, ": got ", value, ", expected 0 to ",
                kMostRows);
    return static_cast<int>(value);
  }
  int head_size(const char* name, int64_t size) const {
    TORCH_CHECK(size <= cuda::attention::kMostHeadSize, op(), ": ", name, ": got a head size of ", size,
                ", expected at most ", cuda::attention::kMostHeadSize);
    return static_cast<int>(size);
  }
  void device(const char* name, const Tensor& t) const {
    TORCH_CHECK(t.layout() == at::kStrided, op(), ": ", name, ": expected a strided tensor");
    TORCH_CHECK(t.device() == options().device(), op(), ": ", name, ": got a tensor on ", t.device(),
                ", expected ", options().device(), " as query");
  }
  void shape(const char* name, const Tensor& t, at::IntArrayRef sizes) const {
    device(name, t);
    TORCH_CHECK(t.sizes() == sizes, op(), ": ", name, ": got shape ", t.sizes(), ", expected ", sizes);
  }
  void type(const char* name, const Tensor& t, at::ScalarType wanted) const {
    TORCH_CHECK(t.scalar_type() == wanted, op(), ": ", name, ": got ", t.scalar_type(), ", expected ",
                wanted);
  }
  void same(const char* name, const Tensor& t, at::IntArrayRef sizes) const {
    shape(name, t, sizes);
    type(name, t, c10::typeMetaToScalarType(options().dtype()));
  }
  bool is_bool(const char* name, const Tensor& t) const {
    device(name, t);
    TORCH_CHECK(t.scalar_type() == at::kBool || t.dtype() == options().dtype(), op(), ": ", name, ": got ",
                t.scalar_type(), ", expected Bool or ", options().dtype(), " as query");
    return t.scalar_type() == at::kBool;
  }

  Call call_{};
  Tensor extra_key_, extra_value_, slopes_, of_queries_, of_keys_, seed_;
};

int splits_of(const Attention& attention) {
  int device = 0, multiprocessors = 0;
  attention.succeeded(cudaGetDevice(&device));
  attention.succeeded(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  return cuda::attention::forward_splits(attention.call(), multiprocessors);
}

// `output` [B, L, H, V]; `softmax` [B, H, L, 2] may be undefined.
void run_forward(const Attention& attention, const Tensor& output, const Tensor& lse, const Tensor& softmax,
                 CUstream_st* stream) {
  cuda::attention::Forward p{};
  p.call = attention.call();
  p.splits = splits_of(attention);
  p.output = output.mutable_data_ptr(), p.lse = lse.mutable_data_ptr();
  p.softmax = softmax.defined() ? softmax.mutable_data_ptr() : nullptr;
  Tensor sums, stats;
  if (p.splits > 1) {
    sums = at::empty({p.splits, output.numel()}, attention.wide());
    stats = at::empty({p.splits, lse.numel(), 2}, attention.wide());
    // Rows that are in no sequence are nobody's to write.
    if (attention.packed()) stats.zero_();
    p.sums = sums.mutable_data_ptr(), p.stats = stats.mutable_data_ptr();
  } else if (attention.packed()) {
    output.zero_();
    lse.fill_(-std::numeric_limits<double>::infinity());
  }
  attention.succeeded(cuda::attention::forward(p, stream));
}

Tensor run_weights(const Attention& attention, const Tensor& softmax, bool mean, CUstream_st* stream) {
  const Call& call = attention.call();
  cuda::attention::Weights p{};
  p.call = call, p.mean = mean, p.softmax = softmax.const_data_ptr();
  const int64_t columns = call.keys + call.extra;
  const Tensor weights =
      p.mean ? at::empty({call.batch, call.queries, columns}, attention.options())
             : at::empty({call.batch, call.heads, call.queries, columns}, attention.options());
  p.weights = weights.mutable_data_ptr();
  attention.succeeded(cuda::attention::weights(p, stream));
  return weights;
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(const calls::AttentionForward& a) {
  const Tensor &query = a.tensors.query, &value = a.tensors.value;
  const c10::DeviceGuard guard(query.device());
  CUstream_st* stream = current_stream(query);
  const Attention attention("attention_forward", a);
  const Tensor output =
      at::empty({query.size(0), query.size(2), query.size(1), value.size(3)}, attention.options());
  const Tensor lse = at::empty({query.size(0), query.size(1), query.size(2)}, attention.wide());
  const bool weights = a.options.weights != "none";
  Tensor softmax;
  if (weights) softmax = at::empty({query.size(0), query.size(1), query.size(2), 2}, attention.wide());
  run_forward(attention, output, lse, softmax, stream);
  return {output.transpose(1, 2), lse,
          weights ? run_weights(attention, softmax, a.options.weights == "mean", stream)
                  : at::empty({0}, attention.options())};
}

// Blocks that share the keys of a row in such a call.
int attention_forward_splits(const calls::AttentionForward& a) {
  const c10::DeviceGuard guard(a.tensors.query.device());
  return splits_of(Attention("attention_forward", a));
}

}  // namespace

FUSEDNN_BINDINGS(cuda) {
  op(m, "attention_forward", &attention_forward);
  op(m, "attention_forward_splits", &attention_forward_splits);
}

}  // namespace fusednn
