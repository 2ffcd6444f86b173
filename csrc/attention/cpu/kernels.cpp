// The kernels of attention of one instruction set, as a table. This file is compiled once for each.
#include "attention/cpu/params.h"

#include "attention/cpu/backward.h"
#include "core/cpu/dtypes.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

template <template <class, class> class Kernel, class Call>
size_t workspace(const Call& p, int threads) {
  Carver count(nullptr);
  with_types(p.call.dtype, [&]<class T, class S>() { Kernel<T, S>(p, threads, count); });
  return count.bytes;
}

template <template <class, class> class Kernel, class Call>
void run(const Call& p, const Parallel& parallel) {
  Carver shared(p.workspace);
  with_types(p.call.dtype,
             [&]<class T, class S>() { Kernel<T, S>(p, parallel.threads, shared).run(parallel); });
}

}  // namespace

FUSEDNN_KERNELS(AttentionKernels) = {
    workspace<AttentionForwardKernel>,
    run<AttentionForwardKernel>,
    workspace<AttentionBackwardKernel>,
    run<AttentionBackwardKernel>,
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
