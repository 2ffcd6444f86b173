// The conv kernels of one instruction set, as a table. This file is compiled once for each.
#include "fusednn/conv_cpu.h"

#include "cpu/conv_forward.h"
#include "cpu/dtypes.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

ConvPlan plan(DType dtype, const DepthwiseShape& s, int64_t out_channels, bool residual, int threads) {
  return with_types(dtype, [&]<class T, class S>() {
    return separable_plan<T>(s, out_channels, residual, sizeof(S), threads);
  });
}

size_t packed_bytes(DType dtype, const DepthwiseShape& s, int64_t out_channels) {
  return with_types(dtype, [&]<class T, class S>() -> size_t {
    return PackedSeparable<T>(s, out_channels, nullptr).bytes;
  });
}

void pack(DType dtype, const DepthwiseShape& s, int64_t out_channels, const void* depthwise_weight,
          const void* depthwise_bias, const void* pointwise_weight, const void* pointwise_bias, void* packed) {
  with_types(dtype, [&]<class T, class S>() {
    const auto as = [](const void* x) { return static_cast<const S*>(x); };
    pack_separable<T>(s, out_channels, as(depthwise_weight), as(depthwise_bias), as(pointwise_weight),
                      as(pointwise_bias), packed);
  });
}

void forward(const SeparableForward& p, const Parallel& parallel) {
  with_types(p.dtype, [&]<class T, class S>() { separable_forward<T, S>(p, parallel); });
}

}  // namespace

extern const ConvKernels conv_table = {plan, packed_bytes, pack, forward, nullptr, nullptr};

}  // namespace fusednn::cpu::FUSEDNN_ISA
