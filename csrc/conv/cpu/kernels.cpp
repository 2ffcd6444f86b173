// The conv kernels of one instruction set, as a table. This file is compiled once for each.
#include "conv/cpu/params.h"

#include "conv/cpu/depthwise_backward.h"
#include "conv/cpu/forward.h"
#include "conv/cpu/pointwise_backward.h"
#include "core/cpu/dtypes.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

ConvPlan plan(DType dtype, const DepthwiseShape& s, int64_t out_channels, bool residual, int threads) {
  return with_types(dtype, [&]<class T, class S>() {
    return separable_plan<T>(s, out_channels, residual, sizeof(S), threads);
  });
}

size_t packed_bytes(DType dtype, const DepthwiseShape& s, int64_t out_channels) {
  Carver count(nullptr);
  with_types(dtype, [&]<class T, class S>() { PackedSeparable<T, S>(s, {}, out_channels, count); });
  return count.bytes;
}

void pack(DType dtype, const DepthwiseShape& s, int64_t out_channels, const void* depthwise_weight,
          const void* depthwise_bias, const void* pointwise_weight, const void* pointwise_bias, void* packed,
          const Parallel& parallel) {
  with_types(dtype, [&]<class T, class S>() {
    pack_separable<T, S>(s, out_channels, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias,
                         packed, parallel);
  });
}

void forward(const SeparableForward& p, const Parallel& parallel) {
  with_types(p.dtype, [&]<class T, class S>() { separable_forward<T, S>(p, parallel); });
}

template <template <class, class> class Pass, class Call>
size_t workspace(const Call& p, int threads) {
  return with_types(p.dtype, [&]<class T, class S>() { return workspace_bytes<Pass<T, S>>(p, threads); });
}

template <template <class, class> class Pass, class Call>
void run(const Call& p, const Parallel& parallel) {
  Carver shared(p.workspace);
  with_types(p.dtype, [&]<class T, class S>() { Pass<T, S>(p, parallel.threads, shared).run(parallel); });
}

void merge(const Statistics& p, const Parallel& parallel) {
  with_types(p.dtype, [&]<class T, class S>() { merge_statistics<T>(p, parallel); });
}

// One block of pixels per thread.
size_t block_workspace(int64_t pixels, int threads) { return threads * pixels * FUSEDNN_VECTOR_BYTES; }

size_t norm_activation_bytes(const NormActivation& p, int threads) {
  return block_workspace(Strips(p.batch, p.area, kElementwisePixels).pixels, threads);
}

void activate_norm(const NormActivation& p, const Parallel& parallel) {
  with_types(p.dtype, [&]<class T, class S>() { norm_activation<T, S>(p, parallel); });
}

size_t norm_sums_bytes(const NormSums& p, int threads) {
  return block_workspace(RowStrips(p.shape).pixels(), threads);
}

void sum_norm(const NormSums& p, const Parallel& parallel) {
  with_types(p.dtype, [&]<class T, class S>() { norm_sums<T, S>(p, parallel); });
}

void coefficients(const NormCoefficients& p, const Parallel& parallel) {
  with_types(p.dtype, [&]<class T, class S>() { norm_coefficients<T>(p, parallel); });
}

}  // namespace

FUSEDNN_KERNELS(ConvKernels) = {
    plan,
    packed_bytes,
    pack,
    forward,
    depthwise_strips,
    workspace<DepthwiseForwardPass>,
    run<DepthwiseForwardPass>,
    workspace<DepthwiseBackwardPass>,
    run<DepthwiseBackwardPass>,
    train_strips,
    merge,
    workspace<PointwiseForwardPass>,
    run<PointwiseForwardPass>,
    norm_activation_bytes,
    activate_norm,
    norm_sums_bytes,
    sum_norm,
    coefficients,
    workspace<PointwiseBackwardPass>,
    run<PointwiseBackwardPass>,
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
