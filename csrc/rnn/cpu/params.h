// CPU kernels of the rnn family: whole cells, products and gates together. No torch here.
//
// B = batch, I = input size, H = hidden size, G = 4 (LSTM: i, f, g, o) or 3 (GRU: r, z, n) gates.
// The last dimension of every operand is contiguous; rows are `stride` elements apart.
// `dtype` is that of input, weights, biases and saved gates; the state (h and c, in and out) is of the same,
// or of float if `wide_state`. Operands of a product (input, hx, gradients) reach the kernels as float or
// double: the caller widens bfloat16 and float16, which are few beside the weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cpu/kernel_table.h"
#include "core/dtype.h"
#include "core/parallel.h"

namespace fusednn::cpu {

enum class Cell : int { lstm, gru };
constexpr int gates_of(Cell cell) { return cell == Cell::lstm ? 4 : 3; }

struct Rows {
  const void* data;
  int64_t stride;
};

struct CellWeights {
  Cell cell;
  DType dtype;
  int64_t input_size, hidden_size;
  Rows weight_ih;       // [G H, I]
  Rows weight_hh;       // [G H, H]
  const void* bias_ih;  // [G H] or null
  const void* bias_hh;  // [G H] or null
};

struct CellForward {
  CellWeights weights;
  int64_t batch;
  bool wide_state;
  Rows input;       // [B, I] float or double
  Rows hx;          // [B, H] float or double
  Rows state;       // [B, H] LSTM: cx; GRU: hx once more, in the state's dtype
  void* h;          // [B, H]
  void* c;          // [B, H], LSTM only
  void* gates;      // [B, 4H] or null; LSTM: i, f, g, o activated; GRU: r, z, n, h_n
  void* workspace;  // forward_workspace() bytes for each thread
};

// The pointwise half of the backward; its products follow with multiply_*.
struct GatesBackward {
  Cell cell;
  DType dtype;
  bool wide_state;
  int64_t batch, hidden_size;
  Rows grad_h;         // [B, H] state dtype, or null data
  Rows grad_c;         // [B, H] state dtype, or null data; LSTM only
  Rows state;          // [B, H] LSTM: cx; GRU: hx
  const void* c;       // [B, H] LSTM only
  const void* gates;   // [B, 4H]
  void* grad_gates;    // [B, G H] float or double, before activation (GRU: of the input product)
  void* grad_gates_h;  // [B, 3H] float or double, GRU only: of the hidden product
  void* grad_state;    // [B, H] float or double; LSTM: of cx; GRU: the direct term of hx
};

// The gradients that pass through one weight:
//   grad_operand[B, N] (+)= grad_gates[B, R] weight[R, N]
//   grad_weight[R, N] = grad_gates^T operand[B, N]
struct WeightGradients {
  DType weight_dtype;
  int64_t batch, gate_rows, size;  // B, R, N
  const void* grad_gates;          // float or double, as all but the weight
  Rows weight;
  Rows operand;        // input or hx; may be null without grad_weight
  void* grad_operand;  // or null
  bool accumulate;     // add to grad_operand
  void* grad_weight;   // or null
};

// out[N] = sum over rows of a[M, N].
struct RowSum {
  int64_t M, N;
  const void* a;
  void* out;
};

// What is left of a backward once the gates' gradients are known.
struct GradientSums {
  bool wide;  // double, not float
  int weight_count, row_sum_count;
  WeightGradients weights[2];
  RowSum row_sums[2];
  void* workspace;  // gradient_workspace() bytes for each thread
};

struct RnnKernels {
  size_t (*forward_workspace)(const CellWeights&);
  void (*cell_forward)(const CellForward&, const Parallel&);

  void (*gates_backward)(const GatesBackward&, const Parallel&);
  size_t (*gradient_workspace)(bool wide);
  // Every sum over K or over rows in an order that the number of threads doesn't change.
  void (*gradient_sums)(const GradientSums&, const Parallel&);
};

}  // namespace fusednn::cpu
