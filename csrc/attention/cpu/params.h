// CPU kernels of attention: what a call is made of, and the table of one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cpu/kernel_table.h"
#include "core/dtype.h"
#include "core/parallel.h"

namespace fusednn::cpu {

template <class Data>
struct HeadRowsOf {  // [B, heads, rows, size], the last dimension contiguous; strides in elements
  Data* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0;
};
using HeadRows = HeadRowsOf<const void>;
using HeadRowsOut = HeadRowsOf<void>;

struct Mask {                  // [B, H, L, S], strides 0 where it is broadcast
  const void* data = nullptr;  // null: none
  bool is_bool = false;        // true takes part; otherwise numbers of the call's dtype, added
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, column_stride = 0;
};

enum class ReturnedWeights { none, mean, heads };

struct Attention {
  DType dtype;
  int64_t batch, heads, groups;  // groups: key heads
  int64_t rows, columns;         // L, S; of packed sequences: of all together
  int64_t size, value_size;      // D, V
  int64_t extra;                 // X more columns
  HeadRows query, key, value;
  Mask mask, key_mask;
  const void* extra_key;        // [groups, X, D], or null
  const void* extra_value;      // [groups, X, V]
  const float* alibi_slopes;    // [heads], or null
  const int32_t* cu_seqlens_q;  // [sequences + 1], or null: then a sequence is a sample
  const int32_t* cu_seqlens_k;
  int64_t sequences, longest_q, longest_k;
  double scale, softcap;                               // softcap 0: none
  int64_t window_left, window_right, position_offset;  // -1: no limit
  bool dropout;
  uint32_t dropout_threshold;
  double dropout_scale;
  uint64_t dropout_seed;
};

struct AttentionForward {
  Attention call;
  HeadRowsOut output;  // [B, H, L, V]
  void* lse;           // [B, H, L], float or double, or null
  ReturnedWeights returned;
  void* weights;  // [B, L, S + X] or [B, H, L, S + X]
  void* workspace;
};

struct AttentionBackward {
  Attention call;
  HeadRows output, grad_output;  // grad_output without data: zero
  const void* lse;               // [B, H, L]
  const void* grad_lse;          // [B, H, L], or null
  ReturnedWeights returned;
  const void* grad_weights;                      // as the forward's weights, or null
  HeadRowsOut grad_query, grad_key, grad_value;  // without data: not wanted
  void* grad_extra_key;                          // [groups, X, D], or null
  void* grad_extra_value;
  // Contiguous, of the masks' shapes: a size is 1 where the mask is broadcast.
  void* grad_mask;
  int64_t mask_sizes[4];
  void* grad_key_mask;  // [B, S]
  void* workspace;
};

struct AttentionKernels {
  size_t (*forward_workspace)(const AttentionForward&, int threads);
  void (*forward)(const AttentionForward&, const Parallel&);
  size_t (*backward_workspace)(const AttentionBackward&, int threads);
  void (*backward)(const AttentionBackward&, const Parallel&);
};

}  // namespace fusednn::cpu
