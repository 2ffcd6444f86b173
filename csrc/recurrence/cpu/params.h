// CPU kernels of attention inside an LSTM or a GRU: a whole sequence in one call. No torch here.
//
// B = batch, T = steps, C = channels, P = positions of a frame, H = hidden size, J = 4 H (LSTM) or 3 H (GRU)
// rows of weight_ih; K = 1 (positional scores) or A (additive) rows of score_weight, Q = P or A of
// hidden_weight. All tensors are dense, of `dtype`: float or double.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cpu/kernel_table.h"
#include "core/dtype.h"
#include "core/parallel.h"
#include "rnn/cpu/params.h"

namespace fusednn::cpu {

struct AttentionLstm {
  Cell cell;
  DType dtype;
  bool flatten;  // the cell's input: the attended frame [C P], or its sum over positions [C]
  bool hoisted;  // weight_ih times all frames before the recurrence
  bool additive;
  int64_t batch, steps, channels, positions, hidden_size, energies;  // energies: K
  double temperature;                                                // a normal number or NaN
  const void* features;                                              // [B, T, C, P]
  const void* score_weight;                                          // [K, C]
  const void* hidden_weight;                                         // [Q, H]
  const void* hidden_bias;                                           // [Q] or null
  const void* v;                                                     // [A]; positional: null
  const void* weight_ih;                                             // [J, C P] or [J, C]
  const void* weight_hh;                                             // [J, H]
  const int64_t* lengths;                                            // [B] or null

  int64_t gate_rows() const { return gates_of(cell) * hidden_size; }
  int64_t terms() const { return additive ? energies : positions; }
  int64_t inputs() const { return flatten ? channels * positions : channels; }
};

struct AttentionLstmForward {
  AttentionLstm q;
  const void* bias_ih;  // [J] or null
  const void* bias_hh;  // [J] or null
  void* h;              // [B, H], in and out
  void* c;              // [B, H], in and out; GRU: null
  void* hidden;         // [B, T, H]
  void* maps;           // [B, T, P]
  void* gates;          // [B, T, 4H] or null; as CellForward's
  void* cells;          // [B, T, H] or null
  void* workspace;
};

// Steps in reverse. The caller makes what no step waits for: products over all steps
// of what this writes.
struct AttentionLstmBackward {
  AttentionLstm q;
  const void* h0;           // [B, H]
  const void* c0;           // [B, H]; GRU: null
  const void* hidden;       // [B, T, H]
  const void* maps;         // [B, T, P]
  const void* gates;        // [B, T, 4H]
  const void* cells;        // [B, T, H]; GRU: null
  const void* grad_hidden;  // [B, T, H] or null
  const void* grad_maps;    // [B, T, P] or null
  void* grad_h;             // [B, H], in and out
  void* grad_c;             // [B, H], in and out; GRU: null
  void* grad_x;             // [B, T, J], of the input's product
  void* grad_r;             // [B, T, J], of the state's product; LSTM: null, the same
  void* grad_scaled;        // [B, T, P], of scores / temperature
  void* grad_products;      // [B, T, K, P], of score_weight times the frames
  void* grad_terms;         // [B, T, A], of the state's term; positional: null, the same as grad_products
  void* grad_v;             // [B, A]; positional: null
  void* grad_attended;      // [B, T, C P], direct and flatten only, else null
  void* workspace;
};

struct AttentionLstmKernels {
  size_t (*forward_workspace)(const AttentionLstmForward&, int threads);
  void (*forward)(const AttentionLstmForward&, const Parallel&);
  size_t (*backward_workspace)(const AttentionLstmBackward&, int threads);
  void (*backward)(const AttentionLstmBackward&, const Parallel&);
};

}  // namespace fusednn::cpu
