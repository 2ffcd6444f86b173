// CUDA launchers of attention inside an LSTM or a GRU: the steps of a sequence, one block a sequence.
//
// B = batch, T = steps, C = channels, P = positions of a frame, H = hidden size, J = 4 H (LSTM) or 3 H (GRU)
// rows of weight_ih; K = 1 (positional scores) or A (additive) rows of score_weight, Q = P or A of
// hidden_weight. Tensors are dense and on the stream's device; "wide" is float, or double for f64. The caller
// makes what no step waits for: products over all steps before and after.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace fusednn::cuda {

// How the product of weight_ih and the attended frame comes about.
enum class CellInput : int {
  projected,  // sum over p of a[p] G[p], G made for all frames before
  sum,        // weight_ih times the sum over p of a[p] f[p], in the step
  between,    // the caller's: one product for all sequences between two launches of a step each
};

struct AttentionLstm {
  DType dtype;
  CellInput input;
  bool lstm, additive;
  bool channels_last;  // frames are [P, C]; not with `between`
  int64_t batch;
  int steps, channels, positions, hidden_size, energies;  // energies: K
  int first, last;                                        // of launches: see the structs below
  const int64_t* lengths;                                 // [B], 1 ... T, or null
  const void* learned_temperature;                        // one wide number, or null
  double temperature;                                     // where none is learned
  const void* features;                                   // [B, T, C, P]; projected: null
  const void* products;                                   // wide [B, T, K, P]: score_weight times the frames
  const void* v;                                          // [A], additive
  const void* projected;  // wide, (b T + t, p, j) by the strides below, or null
  int64_t frame_stride, position_stride;

  FUSEDNN_HOST_DEVICE int gate_rows() const { return (lstm ? 4 : 3) * hidden_size; }
  FUSEDNN_HOST_DEVICE int terms() const { return additive ? energies : positions; }
};

// Steps first ... last - 1. `between`: launch t of 0 ... T ends step t - 1 and begins step t.
// Of ended sequences nothing is written.
struct AttentionLstmForward {
  AttentionLstm q;
  const void* weight;       // [H, J + Q]: weight_hh and hidden_weight, transposed, side by side
  const void* weight_ih;    // sum: [C, J], transposed
  const void* bias_ih;      // [J] or null
  const void* bias_hh;      // [J] or null
  const void* hidden_bias;  // [Q] or null
  void* h;                  // wide [B, H], in and out
  void* c;                  // wide [B, H], in and out; GRU: null
  void* hidden;             // [B, T, H]
  void* maps;               // [B, T, P]
  void* gates;              // wide [B, T, 4 H], activated, or null
  void* cells;              // wide [B, T, H] or null
  // Between, wide:
  void* attended;  // [B, C, P], out
  const void* x;   // [B, J], in: weight_ih times attended
  void* r;         // [B, J], from launch to launch
};

// Steps last - 1 ... first. `between`: launch t of T ... 0 is [t, t + 1): it ends the backward of step t and
// begins that of step t - 1.
struct AttentionLstmBackward {
  AttentionLstm q;
  const void* weight;       // [J + Q, H]: weight_hh and hidden_weight
  const void* weight_ih;    // sum: [J, C]
  const void* h0;           // [B, H]
  const void* c0;           // [B, H]; GRU: null
  const void* hidden;       // [B, T, H]
  const void* maps;         // [B, T, P]
  const void* gates;        // wide [B, T, 4 H]
  const void* cells;        // wide [B, T, H]; GRU: null
  const void* grad_hidden;  // [B, T, H] or null
  const void* grad_maps;    // [B, T, P] or null
  // Wide:
  const void* terms;       // [B, T, A], additive: hidden_weight times the state, and its bias
  const void* d_attended;  // [B, C, P], between: d_x of the step times weight_ih
  void* d_h;               // [B, H], in and out
  void* d_c;               // [B, H], in and out; GRU: null
  void* d_x;               // [B, T, J], of the input's product
  void* d_r;               // [B, T, J], of the state's product; LSTM: null, the same
  void* d_scaled;          // [B, T, P], of scores / temperature
  void* d_products;        // [B, T, K, P]
  void* d_terms;           // [B, T, A]; positional: null, the same as d_products
  void* d_v;               // [B, T, A], additive
};

// Shared memory of a block, in either pass.
size_t attention_lstm_shared_bytes(const AttentionLstm&);

cudaError_t attention_lstm_forward(const AttentionLstmForward&, cudaStream_t);
cudaError_t attention_lstm_backward(const AttentionLstmBackward&, cudaStream_t);

}  // namespace fusednn::cuda
