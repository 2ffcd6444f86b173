// The attend-and-recur kernels of one instruction set, as a table. This file is compiled once for each.
#include "recurrence/cpu/params.h"

#include "recurrence/cpu/backward.h"
#include "recurrence/cpu/forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

int64_t packed_elements(const AttentionLstm& q) {
  return q.dtype == DType::f64 ? packed_weight_elements<double>(q) : packed_weight_elements<float>(q);
}

void pack(const AttentionLstm& q, void* packed, const Parallel& parallel) {
  if (q.dtype == DType::f64)
    pack_weight(q, static_cast<double*>(packed), parallel);
  else
    pack_weight(q, static_cast<float*>(packed), parallel);
}

size_t forward_workspace(const AttentionLstm& q, int threads) {
  return q.dtype == DType::f64 ? ForwardPass<double>::workspace_bytes(q, threads)
                               : ForwardPass<float>::workspace_bytes(q, threads);
}

void forward(const AttentionLstmForward& p, const Parallel& parallel) {
  if (p.q.dtype == DType::f64)
    ForwardPass<double>(p, parallel).run();
  else
    ForwardPass<float>(p, parallel).run();
}

size_t backward_workspace(const AttentionLstm& q, int threads) {
  return q.dtype == DType::f64 ? BackwardPass<double>::workspace_bytes(q, threads)
                               : BackwardPass<float>::workspace_bytes(q, threads);
}

void backward(const AttentionLstmBackward& p, const Parallel& parallel) {
  if (p.q.dtype == DType::f64)
    BackwardPass<double>(p, parallel).run();
  else
    BackwardPass<float>(p, parallel).run();
}

}  // namespace

extern const AttentionLstmKernels attention_lstm_table = {
    packed_elements, pack, forward_workspace, forward, backward_workspace, backward,
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
