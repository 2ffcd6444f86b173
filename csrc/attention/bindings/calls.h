// The arguments of attention's ops, in the order of their schemas; shapes as in fusednn/attention/ops.py and
// projection_ops.py.
#pragma once

#include "core/bindings/arguments.h"

namespace fusednn::calls {

using at::Tensor;

struct AttentionTensors {
  Tensor query, key, value;
  OptionalTensor mask, key_mask, extra_key, extra_value, alibi_slopes, cu_seqlens_q, cu_seqlens_k,
      dropout_seed;
  FUSEDNN_ARGUMENTS(query, key, value, mask, key_mask, extra_key, extra_value, alibi_slopes, cu_seqlens_q,
                    cu_seqlens_k, dropout_seed)
};

struct AttentionOptions {
  int64_t max_seqlen_q, max_seqlen_k;
  double scale;
  int64_t window_left, window_right, position_offset;
  double softcap, dropout_p;
  std::string weights;
  FUSEDNN_ARGUMENTS(max_seqlen_q, max_seqlen_k, scale, window_left, window_right, position_offset, softcap,
                    dropout_p, weights)
};

struct AttentionForward {
  AttentionTensors tensors;
  AttentionOptions options;
  FUSEDNN_ARGUMENTS(tensors, options)
};

struct AttentionBackward {
  OptionalTensor grad_output, grad_lse, grad_weights;
  AttentionTensors tensors;
  Tensor output, lse;
  AttentionOptions options;
  std::array<bool, 7> output_mask;
  FUSEDNN_ARGUMENTS(grad_output, grad_lse, grad_weights, tensors, output, lse, options, output_mask)
};

struct ProjectionForward {
  Tensor input, weight;
  OptionalTensor bias;
  FUSEDNN_ARGUMENTS(input, weight, bias)
};

struct ProjectionBackward {
  Tensor grad, input, weight;
  std::array<bool, 3> output_mask;
  FUSEDNN_ARGUMENTS(grad, input, weight, output_mask)
};

}  // namespace fusednn::calls
