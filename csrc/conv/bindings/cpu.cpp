// fusednn._C.cpu: depthwise and depthwise-separable convolution on CPU tensors; schemas as in
// fusednn/conv/ops.py.
#include "conv/bindings/cpu.h"

#include "core/bindings/cpu_kernel.h"
#include "core/bindings/op.h"

namespace fusednn {

using at::Tensor;
using cpu::DepthwiseShape;

DepthwiseShape depthwise_shape(const Tensor& input, const Tensor& weight, const calls::Geometry& g) {
  const auto& [stride, padding, dilation] = g;
  dtype_of(input, "input");
  TORCH_CHECK(input.dim() == 4, "input: got ", input.dim(), "D, expected 4D [N, C, H, W]");
  TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 1, "depthwise weight: got shape ", weight.sizes(),
              ", expected [C * multiplier, 1, kernel_h, kernel_w]");
  const int64_t in_channels = input.size(1), channels = weight.size(0);
  TORCH_CHECK(in_channels == 0 ? channels == 0 : channels % in_channels == 0, "depthwise weight: got ",
              channels, " channels, expected a multiple of the input's ", in_channels);
  check(weight, "depthwise weight", weight.sizes(),
        weight.scalar_type() == wide_dtype(input) ? wide_dtype(input) : input.scalar_type());
  TORCH_CHECK(input.device().is_cpu(), "input: got a tensor on ", input.device(), ", expected cpu");
  for (int i = 0; i < 2; ++i) {
    TORCH_CHECK(stride[i] > 0, "stride: got ", stride[i], ", expected at least 1");
    TORCH_CHECK(dilation[i] > 0, "dilation: got ", dilation[i], ", expected at least 1");
    TORCH_CHECK(weight.size(2 + i) > 0, "depthwise weight: got shape ", weight.sizes(),
                ", expected a kernel");
  }
  for (const int64_t p : padding) TORCH_CHECK(p >= 0, "padding: got ", p, ", expected at least 0");
  const auto out_size = [&](int dim, int64_t pad) {
    const int64_t reach = dilation[dim] * (weight.size(2 + dim) - 1) + 1, padded = input.size(2 + dim) + pad;
    TORCH_CHECK(padded >= reach, "input: got ", padded, " padded ", dim == 0 ? "rows" : "columns",
                ", expected at least the kernel's ", reach);
    return (padded - reach) / stride[dim] + 1;
  };
  const int64_t out_height = out_size(0, padding[0] + padding[1]),
                out_width = out_size(1, padding[2] + padding[3]);
  return {input.size(0), channels,       in_channels == 0 ? 1 : channels / in_channels,
          input.size(2), input.size(3),  out_height,
          out_width,     weight.size(2), weight.size(3),
          stride[0],     stride[1],      padding[0],
          padding[2],    dilation[0],    dilation[1]};
}

at::MemoryFormat conv_format(const Tensor& input, at::ArrayRef<Tensor> weights) {
  const auto last = [](const Tensor& t) {
    return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  };
  bool found = last(input);
  if (input.scalar_type() != at::kDouble)
    for (const Tensor& w : weights) found = found || last(w);
  return found ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

DenseImage::DenseImage(const Tensor& t) {
  last = t.is_contiguous(at::MemoryFormat::ChannelsLast);
  tensor = last || t.is_contiguous() ? t : t.contiguous(t.suggest_memory_format());
  last = last || (!t.is_contiguous() && t.suggest_memory_format() == at::MemoryFormat::ChannelsLast);
}

cpu::Image DenseImage::image() const { return {const_cast<void*>(tensor.const_data_ptr()), last}; }

Tensor pack_separable(const DepthwiseShape& shape, const Tensor& depthwise_weight,
                      const OptionalTensor& depthwise_bias, const Tensor& pointwise_weight,
                      const OptionalTensor& pointwise_bias) {
  const auto& kernels = cpu::kernels<cpu::ConvKernels>();
  const DType dtype = dtype_of(depthwise_weight, "depthwise weight");
  const int64_t out_channels = pointwise_weight.size(0);
  const Tensor w1 = depthwise_weight.contiguous(), w2 = pointwise_weight.contiguous();
  const OptionalTensor b1 = dense(depthwise_bias), b2 = dense(pointwise_bias);
  Tensor packed =
      at::empty({static_cast<int64_t>(kernels.packed_bytes(dtype, shape, out_channels))}, at::kByte);
  kernels.pack_separable(dtype, shape, out_channels, w1.const_data_ptr(), data_or_null(b1),
                         w2.const_data_ptr(), data_or_null(b2), packed.mutable_data_ptr(), torch_parallel());
  return packed;
}

Tensor run_separable(const SeparableCall& call, const Tensor& input, const Tensor& packed,
                     const OptionalTensor& residual) {
  const DepthwiseShape& shape = call.shape;
  const auto& kernels = cpu::kernels<cpu::ConvKernels>();
  const cpu::Parallel threads = torch_parallel();
  const DType dtype = dtype_of(input, "input");
  Tensor out = at::empty({shape.batch, call.out_channels, shape.out_height, shape.out_width}, input.options(),
                         call.format);
  const DenseImage in(input);
  const bool last = call.format == at::MemoryFormat::ChannelsLast;
  const Tensor add = residual ? residual->contiguous(call.format) : Tensor();
  const cpu::ConvPlan plan =
      kernels.separable_plan(dtype, shape, call.out_channels, residual.has_value(), threads.threads);
  const Scratch scratch(plan.thread_bytes * threads.threads + plan.shared_bytes);
  kernels.separable_forward({dtype,
                             shape,
                             call.out_channels,
                             call.activation1,
                             call.activation2,
                             packed.const_data_ptr(),
                             in.image(),
                             {add.defined() ? const_cast<void*>(add.const_data_ptr()) : nullptr, last},
                             {out.mutable_data_ptr(), last},
                             plan,
                             scratch.data()},
                            threads);
  return out;
}

Tensor separable_conv2d_forward(const calls::SeparableForward& a) {
  const auto& [input, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual, geometry,
               activations] = a;
  const SeparableCall call{depthwise_shape(input, depthwise_weight, geometry), pointwise_weight.size(0),
                           conv_format(input, {depthwise_weight, pointwise_weight}), activations.depthwise(),
                           activations.pointwise()};
  const DepthwiseShape& shape = call.shape;
  const auto type = depthwise_weight.scalar_type();  // the input's, or float32 beside 16 bits
  check(depthwise_bias, "depthwise_bias", {shape.channels}, type);
  check(pointwise_weight, "pointwise_weight", {call.out_channels, shape.channels, 1, 1}, type);
  check(pointwise_bias, "pointwise_bias", {call.out_channels}, type);
  const at::DimVector out_sizes{shape.batch, call.out_channels, shape.out_height, shape.out_width};
  check(residual, "residual", out_sizes, input.scalar_type());
  if (c10::multiply_integers(out_sizes) == 0) return at::empty(out_sizes, input.options(), call.format);

  const Tensor packed =
      pack_separable(shape, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias);
  return run_separable(call, input, packed, residual);
}

namespace {

// How separable_conv2d_forward would go about such a call: numbers for `explain`.
pybind11::dict separable_conv2d_plan(const Tensor& input, const Tensor& depthwise_weight,
                                     const Tensor& pointwise_weight, bool residual, const Pair& stride,
                                     const Padding& padding, const Pair& dilation) {
  const DepthwiseShape shape = depthwise_shape(input, depthwise_weight, {stride, padding, dilation});
  const int threads = torch_parallel().threads;
  const cpu::ConvPlan plan = cpu::kernels<cpu::ConvKernels>().separable_plan(
      dtype_of(input, "input"), shape, pointwise_weight.size(0), residual, threads);
  pybind11::dict d;
  d["fused"] = plan.fused;
  d["threads"] = threads;
  d["rows_per_strip"] = plan.rows;
  d["tasks"] = plan.strips;
  d["product_tasks"] = plan.tiles;
  d["bytes_fused"] = plan.bytes;
  d["bytes_unfused"] = plan.bytes_unfused;
  d["workspace_bytes"] = plan.thread_bytes * threads + plan.shared_bytes;
  return d;
}

}  // namespace

FUSEDNN_BINDINGS(cpu) {
  op(m, "separable_conv2d_forward", &separable_conv2d_forward);
  m.def("separable_conv2d_plan", &separable_conv2d_plan);
}

}  // namespace fusednn
