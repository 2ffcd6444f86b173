// The attend-and-recur kernels of one instruction set, as a table. This file is compiled once for each.
#include "recurrence/cpu/params.h"

#include "core/cpu/dtypes.h"
#include "recurrence/cpu/backward.h"
#include "recurrence/cpu/forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

template <class F>
auto with_element(const AttentionLstm& q, const F& f) {
  return with_accumulator(q.dtype == DType::f64, f);
}

int64_t packed_elements(const AttentionLstm& q) {
  return with_element(q, [&]<class T>() { return packed_weight_elements<T>(q); });
}

void pack(const AttentionLstm& q, void* packed, const Parallel& parallel) {
  with_element(q, [&]<class T>() { pack_weight(q, static_cast<T*>(packed), parallel); });
}

size_t forward_workspace(const AttentionLstm& q, int threads) {
  Carver count(nullptr);
  with_element(q, [&]<class T>() { ForwardPass<T>::layout(q, threads, count); });
  return count.bytes;
}

void forward(const AttentionLstmForward& p, const Parallel& parallel) {
  Carver shared(p.workspace);
  with_element(p.q, [&]<class T>() { ForwardPass<T>(p, parallel, shared).run(); });
}

size_t backward_workspace(const AttentionLstm& q, int threads) {
  Carver count(nullptr);
  with_element(q, [&]<class T>() { BackwardPass<T>::layout(q, threads, count); });
  return count.bytes;
}

void backward(const AttentionLstmBackward& p, const Parallel& parallel) {
  Carver shared(p.workspace);
  with_element(p.q, [&]<class T>() { BackwardPass<T>(p, parallel, shared).run(); });
}

}  // namespace

extern const AttentionLstmKernels attention_lstm_table = {
    packed_elements, pack, forward_workspace, forward, backward_workspace, backward,
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
