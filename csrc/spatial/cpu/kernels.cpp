// The kernels of spatial attention of one instruction set, as a table. This file is compiled once for each.
#include "spatial/cpu/params.h"

#include "core/cpu/dtypes.h"
#include "spatial/cpu/backward.h"
#include "spatial/cpu/forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

const SpatialForward& forward_of(const SpatialForward& p) { return p; }
const SpatialForward& forward_of(const SpatialBackward& p) { return p.forward; }

// f(pass) with the call's Pass<T, S, Image> on `workspace`; without one it is there to count bytes.
template <template <class, class, template <class> class> class Pass, class Call, class F>
void with_pass(const Call& call, int threads, Carver& workspace, const F& f) {
  with_types(forward_of(call).dtype, [&]<class T, class S>() {
    with_layout(forward_of(call).shape,
                [&]<template <class> class Image>() { f(Pass<T, S, Image>(call, threads, workspace)); });
  });
}

template <template <class, class, template <class> class> class Pass, class Call>
size_t workspace(const Call& call, int threads) {
  Carver count(nullptr);
  with_pass<Pass>(call, threads, count, [](const auto&) {});
  return count.bytes;
}

template <template <class, class, template <class> class> class Pass, class Call>
void run(const Call& call, const Parallel& parallel) {
  Carver shared(call.workspace);
  with_pass<Pass>(call, parallel.threads, shared, [&](const auto& pass) { pass.run(parallel); });
}

}  // namespace

FUSEDNN_KERNELS(SpatialKernels) = {
    workspace<SpatialForwardPass>,
    run<SpatialForwardPass>,
    workspace<SpatialBackwardPass>,
    run<SpatialBackwardPass>,
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
