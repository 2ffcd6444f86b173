// CPU kernels of linear maps of many rows, in float32: the projections around attention.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cpu/kernel_table.h"
#include "core/parallel.h"

namespace fusednn::cpu {

// out[M, N] = a[M, K] b[K, N] + bias[N]. Strides in elements.
struct MatrixProduct {
  int64_t rows, columns, depth;  // M, N, K
  const float* a;
  int64_t a_row_stride, a_depth_stride;  // one of them 1
  const float* packed;                   // b, by pack()
  const float* bias;                     // or null
  float* out;
  int64_t out_row_stride;
  float* row_sums;  // [M]: sums of a over K, or null; with a_row_stride 1 alone
  void* workspace;
};

// Element (k, n) of b at data[k * depth_stride + n * column_stride]; one of them 1.
struct PackedOperand {
  int64_t columns, depth;
  const float* data;
  int64_t column_stride, depth_stride;
  float* packed;  // [packed_elements(columns, depth)]
};

struct ProjectionKernels {
  int64_t (*packed_elements)(int64_t columns, int64_t depth);
  void (*pack)(const PackedOperand&, const Parallel&);
  size_t (*workspace)(const MatrixProduct&, int threads);
  void (*multiply)(const MatrixProduct&, const Parallel&);
};

}  // namespace fusednn::cpu
