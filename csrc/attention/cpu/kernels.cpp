// The kernels of attention of one instruction set, as a table. This file is compiled once for each.
#include "attention/cpu/params.h"

#include "attention/cpu/backward.h"
#include "core/cpu/dtypes.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

size_t forward_workspace(const AttentionForward& p, int threads) {
  Carver count(nullptr);
  with_types(p.call.dtype, [&]<class T, class S>() { AttentionForwardKernel<T, S>(p, threads, count); });
  return count.bytes;
}

void forward(const AttentionForward& p, const Parallel& parallel) {
  Carver shared(p.call.workspace);
  with_types(p.call.dtype, [&]<class T, class S>() {
    AttentionForwardKernel<T, S>(p, parallel.threads, shared).run(parallel);
  });
}

size_t backward_workspace(const AttentionBackward& p, int threads) {
  Carver count(nullptr);
  with_types(p.call.dtype, [&]<class T, class S>() { AttentionBackwardKernel<T, S>(p, threads, count); });
  return count.bytes;
}

void backward(const AttentionBackward& p, const Parallel& parallel) {
  Carver shared(p.call.workspace);
  with_types(p.call.dtype, [&]<class T, class S>() {
    AttentionBackwardKernel<T, S>(p, parallel.threads, shared).run(parallel);
  });
}

}  // namespace

extern const AttentionKernels attention_table = {forward_workspace, forward, backward_workspace, backward};

}  // namespace fusednn::cpu::FUSEDNN_ISA
