// CUDA launchers of the rnn family: the pointwise half of the cells; the products are the caller's.
//
// Every tensor is contiguous, of `dtype`, and on the stream's device. B = batch, H = hidden.
// Gates lie side by side in a row: LSTM [i | f | g | o] (4H), GRU products [r | z | n] (3H).
// The saved GRU gates are [r | z | n | h_n] (4H), where h_n is the hidden product of n with its bias.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"

namespace fusednn::cuda {

struct LstmGatesForward {
  DType dtype;
  int64_t batch, hidden;
  void* gates;          // [B, 4H] in: both products summed; out: activated gates, if save_gates
  const void* bias_ih;  // [4H] or null
  const void* bias_hh;  // [4H] or null
  const void* cx;       // [B, H]
  void* h;              // [B, H]
  void* c;              // [B, H]
  bool save_gates;
};

struct LstmGatesBackward {
  DType dtype;
  int64_t batch, hidden;
  const void* grad_h;  // [B, H] or null: zero
  const void* grad_c;  // [B, H] or null: zero
  const void* gates;   // [B, 4H] activated
  const void* cx;      // [B, H]
  const void* c;       // [B, H]
  void* grad_gates;    // [B, 4H] before activation
  void* grad_cx;       // [B, H]
};

struct GruGatesForward {
  DType dtype;
  int64_t batch, hidden;
  const void* gates_x;  // [B, 3H] input product
  const void* gates_h;  // [B, 3H] hidden product
  const void* bias_ih;  // [3H] or null
  const void* bias_hh;  // [3H] or null
  const void* hx;       // [B, H]
  void* h;              // [B, H]
  void* gates;          // [B, 4H] saved for backward, or null
};

struct GruGatesBackward {
  DType dtype;
  int64_t batch, hidden;
  const void* grad_h;  // [B, H]
  const void* gates;   // [B, 4H] as saved
  const void* hx;      // [B, H]
  void* grad_gates_x;  // [B, 3H]
  void* grad_gates_h;  // [B, 3H]
  void* grad_hx;       // [B, H] the direct term; the caller adds grad_gates_h @ weight_hh
};

cudaError_t lstm_gates_forward(const LstmGatesForward&, cudaStream_t);
cudaError_t lstm_gates_backward(const LstmGatesBackward&, cudaStream_t);
cudaError_t gru_gates_forward(const GruGatesForward&, cudaStream_t);
cudaError_t gru_gates_backward(const GruGatesBackward&, cudaStream_t);

}  // namespace fusednn::cuda
