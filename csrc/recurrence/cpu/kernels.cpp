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

template <template <class> class Pass, class Call>
size_t workspace(const Call& p, int threads) {
  Carver count(nullptr);
  with_element(p.q, [&]<class T>() { Pass<T>::layout(p.q, threads, count); });
  return count.bytes;
}

template <template <class> class Pass, class Call>
void run(const Call& p, const Parallel& parallel) {
  Carver shared(p.workspace);
  with_element(p.q, [&]<class T>() { Pass<T>(p, parallel, shared).run(); });
}

}  // namespace

FUSEDNN_KERNELS(AttentionLstmKernels) = {
    workspace<ForwardPass>,
    run<ForwardPass>,
    workspace<BackwardPass>,
    run<BackwardPass>,
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
