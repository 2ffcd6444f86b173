// CUDA launchers of the attention family: python/fusednn/attention/reference.py has the formulas.
//
// B = batch (or sequences, packed), H = query heads, G = key heads, L = queries, S = keys, X = extra columns,
// D = head size, V = size of a value. Query head h reads key head h / (H / G). Tensors may have any strides,
// given in elements; 0 where one entry serves all. Everything is on the stream's device; "wide" is float, or
// double for f64.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"

namespace fusednn::cuda::attention {

constexpr int kMostHeadSize = 256, kMostExtra = 2;

struct Strides {
  int64_t batch, head, row, column;
};

// `packs`: rows are dense, start at multiples of 16 bytes, and are as long as one.
struct Operand {
  const void* data;
  Strides strides;
  bool packs;
};

// What both kernels read.
struct Call {
  DType dtype;
  int64_t batch;                      // packed: sequences
  int64_t queries, keys;              // L, S; packed: of the longest sequence
  int64_t total_queries, total_keys;  // as queries and keys; packed: of all sequences
  int heads, key_heads, head_size, value_size, extra;
  Operand query, key, value;
  const void* mask;  // [B, H, L, S] or null
  Strides mask_strides;
  bool mask_is_bool;     // else of the query's type, added
  const void* key_mask;  // [B, S] or null
  int64_t key_mask_batch, key_mask_column;
  bool key_mask_is_bool;
  const void* extra_key;        // [G, X, D], dense, or null
  const void* extra_value;      // [G, X, V], dense, or null
  const float* alibi_slopes;    // [H] or null
  const int32_t* cu_seqlens_q;  // [B + 1] or null, as cu_seqlens_k
  const int32_t* cu_seqlens_k;
  const int64_t* dropout_seed;        // null: no dropout
  double scale, softcap;              // softcap 0: none
  int64_t window_left, window_right;  // -1: no limit
  int64_t position_offset;
  uint32_t dropout_threshold;  // math::dropout_threshold, math::dropout_scale
  double dropout_scale;
};

struct Forward {
  Call call;
  int splits;     // forward_splits
  void* output;   // [B, L, H, V]; packed: [T, H, V]
  void* lse;      // [B, H, L], wide; packed: [H, T]
  void* softmax;  // as lse, times 2, or null: the largest score, the sum of exp(score - largest)
  // Of more than one split, wide; packed: stats hold zeros at first.
  void* sums;   // [splits, B L H, V]
  void* stats;  // [splits, B L H, 2]: as softmax
};

struct Weights {
  Call call;
  const void* softmax;  // as Forward's
  bool mean;
  void* weights;  // [B, L, S + X] of the mean over heads, or [B, H, L, S + X]
};

// Blocks that share a row's keys, on a device of so many multiprocessors.
int forward_splits(const Call&, int multiprocessors);

cudaError_t forward(const Forward&, cudaStream_t);
cudaError_t weights(const Weights&, cudaStream_t);  // not packed

}  // namespace fusednn::cuda::attention
