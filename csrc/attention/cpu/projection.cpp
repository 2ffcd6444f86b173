// out[M, N] = a[M, K] b[K, N] + bias, for many rows: a linear map and its gradients. This file is compiled once for
// each instruction set.
//
// b is packed in panels [N / P][K][P], P = two vectors. A task is a block of rows of a; a tile, 12 rows by 2
// vectors (6 by 2 with 16 registers), goes through up to kDepth of K at a time, in which its panel, 64 KiB
// with AVX-512, streams from the second-level cache: 128 bytes for 24 products. a is read where it lies while
// its rows are contiguous; for a gradient of a weight, where they are columns of memory, a block of it is
// copied first, since its lines would fall on a few sets of the first-level cache.
//
// Flops 2 M N K. Bytes: a and out once, b's panels once for each block of rows, from the third-level cache.
// Every sum goes over K in the same order for any number of threads.
#include "attention/cpu/projection_params.h"

#include "attention/cpu/pack.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

using T = float;
constexpr int64_t P = kPanelColumns<T>;
constexpr int64_t kRows = 120;        // of a task, at most
constexpr int64_t kCopiedRows = 96;   // where a is copied
constexpr int64_t kSerial = 1 << 18;  // products below which threads cost more than they save
constexpr int64_t kCopyPitch = kCopiedRows + Vec<T>::size;

int64_t packed_elements(int64_t columns, int64_t depth) { return ceil_div(columns, P) * P * depth; }

void pack(const PackedOperand& b, const Parallel& parallel) {
  parallel(ceil_div(b.columns, P), b.columns * b.depth > kSerial / 8, [&](int64_t begin, int64_t end, int) {
    if (b.depth_stride == 1) {
      const Source<T> from{b.data, b.column_stride, b.columns, nullptr, 0, b.depth};
      for (int64_t i = begin; i < end; ++i) pack_panel_of_columns(from, i, b.packed);
      return;
    }
    for (int64_t i = begin; i < end; ++i)
      pack_panel(b.depth, b.columns - i * P, P, b.data + i * P, b.depth_stride, b.packed + i * P * b.depth);
  });
}

bool copied(const MatrixProduct& p) { return p.a_depth_stride != 1 || p.row_sums; }

// Blocks as many as threads have equal shares of; what they are does not change a sum.
int64_t block_height(const MatrixProduct& p, int threads) {
  const int64_t most = copied(p) ? kCopiedRows : kRows;
  const int64_t blocks = ceil_div(ceil_div(p.rows, most), threads) * threads;
  return ceil_div(p.rows, blocks);
}

// What a thread works with.
struct Buffers {
  T *a, *edge;
  Buffers(const MatrixProduct& p, Carver& own) {
    a = own.take<T>(copied(p) ? kDepth * kCopyPitch : 0);
    edge = own.take<T>(p.columns % P ? kRows * P : 0);
  }
};

size_t workspace(const MatrixProduct& p, int threads) {
  Carver count(nullptr);
  for (int t = 0; t < threads; ++t) Buffers(p, count);
  return count.bytes;
}

// Rows [first, first + rows), depth [k, k + depth).
void block(const MatrixProduct& p, int64_t first, int64_t rows, int64_t k, int64_t depth, Strided<T> a,
           const Buffers& buffers) {
  for (int64_t n = 0; n < p.columns; n += P) {
    const bool whole = n + P <= p.columns;
    T* out = p.out + first * p.out_row_stride + n;
    T* to = whole ? out : buffers.edge;
    const int64_t stride = whole ? p.out_row_stride : P, count = minimum(P, p.columns - n);
    if (!whole && k > 0)
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(to + r * P, out + r * p.out_row_stride, count * sizeof(T));
    T bias[P] = {};
    const bool biased = p.bias && k == 0;
    if (biased) std::memcpy(bias, p.bias + n, count * sizeof(T));
    multiply_panel<kWide>(rows, depth, a, p.packed + n * p.depth + k * P, P, to, stride,
                          k > 0 || biased ? Into::add : Into::overwrite, biased ? bias : nullptr);
    if (whole) continue;
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * p.out_row_stride, to + r * P, count * sizeof(T));
  }
}

// Columns [first, first + rows) of memory, as rows of a; their sums on the way.
void copy_block(const MatrixProduct& p, int64_t first, int64_t rows, int64_t k, int64_t depth, T* to) {
  constexpr int w = Vec<T>::size;
  const T* from = p.a + first + k * p.a_depth_stride;
  for (int64_t i = 0; i < depth; ++i)
    for (int64_t r = 0; r < rows; r += w)
      Vec<T>::load(from + i * p.a_depth_stride + r, rows - r).store(to + i * kCopyPitch + r);
  if (!p.row_sums) return;
  for (int64_t r = 0; r < rows; r += w) {
    Vec<T> total(T(0));
    for (int64_t i = 0; i < depth; ++i) total = total + Vec<T>::load(to + i * kCopyPitch + r);
    if (k > 0) total = total + Vec<T>::load(p.row_sums + first + r, rows - r);
    total.store(p.row_sums + first + r, rows - r);
  }
}

void multiply_all(const MatrixProduct& p, const Parallel& parallel) {
  const int64_t height = block_height(p, parallel.threads);
  const size_t each = workspace(p, 1);
  const bool worth_it = p.rows * p.columns * p.depth > kSerial;
  parallel(ceil_div(p.rows, height), worth_it, [&](int64_t begin, int64_t end, int thread) {
    Carver own(static_cast<char*>(p.workspace) + thread * each);
    const Buffers buffers(p, own);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * height, rows = minimum(height, p.rows - first);
      for (int64_t k = 0; k < p.depth; k += kDepth) {
        const int64_t depth = minimum(kDepth, p.depth - k);
        Strided<T> a{p.a + first * p.a_row_stride + k * p.a_depth_stride, p.a_row_stride, p.a_depth_stride};
        if (copied(p)) {
          copy_block(p, first, rows, k, depth, buffers.a);
          a = {buffers.a, 1, kCopyPitch};
        }
        block(p, first, rows, k, depth, a, buffers);
      }
    }
  });
}

}  // namespace

FUSEDNN_KERNELS(ProjectionKernels) = {packed_elements, pack, workspace, multiply_all};

}  // namespace fusednn::cpu::FUSEDNN_ISA
