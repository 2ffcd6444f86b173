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
    packed_elements,   pack, workspace<ForwardPass>, run<ForwardPass>, workspace<BackwardPass>,
    run<BackwardPass>,
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
