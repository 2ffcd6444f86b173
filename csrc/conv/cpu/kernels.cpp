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

size_t depthwise_forward_workspace(const DepthwiseForward& p, int threads) {
  return with_types(
      p.dtype, [&]<class T, class S>() { return workspace_bytes<DepthwiseForwardPass<T, S>>(p, threads); });
}

void forward_depthwise(const DepthwiseForward& p, const Parallel& parallel) {
  with_types(p.dtype, [&]<class T, class S>() { depthwise_forward<T, S>(p, parallel); });
}

size_t backward_depthwise_workspace(const DepthwiseBackward& p, int threads) {
  return with_types(
      p.dtype, [&]<class T, class S>() { return workspace_bytes<DepthwiseBackwardPass<T, S>>(p, threads); });
}

void backward_depthwise(const DepthwiseBackward& p, const Parallel& parallel) {
  with_types(p.dtype, [&]<class T, class S>() { depthwise_backward<T, S>(p, parallel); });
}

void merge(const Statistics& p, const Parallel& parallel) {
  with_types(p.dtype, [&]<class T, class S>() { merge_statistics<T>(p, parallel); });
}

size_t forward_pointwise_workspace(const PointwiseForward& p, int threads) {
  return with_types(
      p.dtype, [&]<class T, class S>() { return workspace_bytes<PointwiseForwardPass<T, S>>(p, threads); });
}

void forward_pointwise(const PointwiseForward& p, const Parallel& parallel) {
  with_types(p.dtype, [&]<class T, class S>() { pointwise_forward<T, S>(p, parallel); });
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

size_t backward_pointwise_workspace(const PointwiseBackward& p, int threads) {
  return with_types(
      p.dtype, [&]<class T, class S>() { return workspace_bytes<PointwiseBackwardPass<T, S>>(p, threads); });
}

void backward_pointwise(const PointwiseBackward& p, const Parallel& parallel) {
  with_types(p.dtype, [&]<class T, class S>() { pointwise_backward<T, S>(p, parallel); });
}

}  // namespace

FUSEDNN_KERNELS(ConvKernels) = {
    plan,
    packed_bytes,
    pack,
    forward,
    depthwise_strips,
    depthwise_forward_workspace,
    forward_depthwise,
    backward_depthwise_workspace,
    backward_depthwise,
    train_strips,
    merge,
    forward_pointwise_workspace,
    forward_pointwise,
    norm_activation_bytes,
    activate_norm,
    norm_sums_bytes,
    sum_norm,
    coefficients,
    backward_pointwise_workspace,
    backward_pointwise,
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
