// The attend-and-recur kernels of one instruction set, as a table. This file is compiled once for each.
#include "fusednn/attention_lstm_cpu.h"

#include "cpu/attention_lstm_backward.h"
#include "cpu/attention_lstm_forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

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
    forward_workspace,
    forward,
    backward_workspace,
    backward,
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
