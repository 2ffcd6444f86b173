// The attend-and-recur kernels of one instruction set, as a table. This file is compiled once for each.
#include "recurrence/cpu/params.h"

#include "core/cpu/dtypes.h"
#include "recurrence/cpu/backward.h"
#include "recurrence/cpu/forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

int64_t packed_elements(const AttentionLstm& q) {
  return with_types(q.dtype, [&]<class T, class S>() { return packed_weight_elements<T>(q); });
}

void pack(const AttentionLstm& q, void* packed, const Parallel& parallel) {
  with_types(q.dtype, [&]<class T, class S>() { pack_weight(q, static_cast<T*>(packed), parallel); });
}

template <template <class> class Pass, class Call>
size_t workspace(const Call& p, int threads) {
  return with_types(p.q.dtype, [&]<class T, class S>() { return Pass<T>::workspace_bytes(p.q, threads); });
}

template <template <class> class Pass, class Call>
void run(const Call& p, const Parallel& parallel) {
  with_types(p.q.dtype, [&]<class T, class S>() { Pass<T>(p, parallel).run(); });
}

}  // namespace

FUSEDNN_KERNELS(AttentionLstmKernels) = {
    packed_elements,   pack, workspace<ForwardPass>, run<ForwardPass>, workspace<BackwardPass>,
    run<BackwardPass>,
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
