// Python face of the CUDA launchers of attention; schema as in fusednn/attention/ops.py.
//
// Device-agnostic: the tensors' device decides the guard, current_stream the stream.
#include "attention/cuda/params.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "attention/bindings/checked.h"
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

// A call's tensors, checked, and their description.
class Attention : public CheckedAttention {
 public:
  Attention(const char* op, const calls::AttentionForward& a) : CheckedAttention(op, a.tensors, a.options) {
    call_.dtype = dtype();
    call_.batch = packed() ? cu_seqlens_q->size(0) - 1 : batch;
    call_.heads = small("heads", heads), call_.key_heads = small("key heads", groups);
    call_.total_queries = small("queries", rows, kMostRows);
    call_.total_keys = small("keys", columns, kMostRows);
    call_.queries = packed() ? small("max_seqlen_q", a.options.max_seqlen_q, kMostRows) : rows;
    call_.keys = packed() ? small("max_seqlen_k", a.options.max_seqlen_k, kMostRows) : columns;
    call_.head_size = small("head size", size, cuda::attention::kMostHeadSize);
    call_.value_size = small("value size", value_size, cuda::attention::kMostHeadSize);
    call_.extra = small("extra columns", extra, cuda::attention::kMostExtra);
    call_.query = operand(a.tensors.query), call_.key = operand(a.tensors.key);
    call_.value = operand(a.tensors.value);
    if (const OptionalTensor& mask = a.tensors.mask) {
      call_.mask = mask->const_data_ptr(), call_.mask_strides = strides_of(*mask);
      call_.mask_is_bool = mask->scalar_type() == at::kBool;
    }
    if (const OptionalTensor& mask = a.tensors.key_mask) {
      call_.key_mask = mask->const_data_ptr();
      call_.key_mask_is_bool = mask->scalar_type() == at::kBool;
      call_.key_mask_batch = step(*mask, 0), call_.key_mask_column = step(*mask, 1);
    }
    call_.extra_key = data_or_null(extra_key), call_.extra_value = data_or_null(extra_value);
    call_.alibi_slopes = static_cast<const float*>(data_or_null(alibi_slopes));
    call_.cu_seqlens_q = static_cast<const int32_t*>(data_or_null(cu_seqlens_q));
    call_.cu_seqlens_k = static_cast<const int32_t*>(data_or_null(cu_seqlens_k));
    if (dropout) call_.dropout_seed = a.tensors.dropout_seed->const_data_ptr<int64_t>();
    call_.dropout_threshold = dropout_threshold, call_.dropout_scale = dropout_scale;
    set_scores(a.options);
  }

  const Call& call() const { return call_; }

 private:
  void set_scores(const calls::AttentionOptions& options) {
    constexpr int64_t kFar = int64_t{1} << 60;  // sums of a few don't overflow
    const int64_t offset = options.position_offset;
    TORCH_CHECK(offset > -kFar && offset < kFar, op(), ": position_offset: got ", offset);
    call_.scale = options.scale, call_.softcap = options.softcap, call_.position_offset = offset;
    call_.window_left = std::min(options.window_left, kFar);
    call_.window_right = std::min(options.window_right, kFar);
  }

  Call call_{};
};

int splits_of(const Attention& attention) {
  int device = 0, multiprocessors = 0;
  launched(attention, cudaGetDevice(&device));
  launched(attention, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
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
    sums = at::empty({p.splits, output.numel()}, attention.wide_options());
    stats = at::empty({p.splits, lse.numel(), 2}, attention.wide_options());
    // Rows that are in no sequence are nobody's to write.
    if (attention.packed()) stats.zero_();
    p.sums = sums.mutable_data_ptr(), p.stats = stats.mutable_data_ptr();
  } else if (attention.packed()) {
    output.zero_();
    lse.fill_(-std::numeric_limits<double>::infinity());
  }
  launched(attention, cuda::attention::forward(p, stream));
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
  launched(attention, cuda::attention::weights(p, stream));
  return weights;
}

std::tuple<Tensor, Tensor, Tensor> attention_forward(const calls::AttentionForward& a) {
  const Tensor &query = a.tensors.query, &value = a.tensors.value;
  const c10::DeviceGuard guard(query.device());
  CUstream_st* stream = current_stream(query);
  const Attention attention("attention_forward", a);
  const Tensor output =
      at::empty({query.size(0), query.size(2), query.size(1), value.size(3)}, attention.options());
  const Tensor lse = at::empty({query.size(0), query.size(1), query.size(2)}, attention.wide_options());
  const bool weights = a.options.weights != "none";
  Tensor softmax;
  if (weights)
    softmax = at::empty({query.size(0), query.size(1), query.size(2), 2}, attention.wide_options());
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
