// fusednn._C.cpu: depthwise convolution with its gradients.
#include "conv/bindings/cpu.h"
#include "core/bindings/cpu_kernel.h"
#include "core/bindings/op.h"

namespace fusednn {

using at::Tensor;
using cpu::DepthwiseShape;

Depthwise::Depthwise(const Tensor& x, const Tensor& w, const OptionalTensor& b,
                     const calls::Geometry& geometry)
    : shape(depthwise_shape(x, w, geometry)),
      dtype(dtype_of(x, "input")),
      input(x),
      weight(w.contiguous()),
      bias(dense(b)) {
  check(w, "depthwise weight", w.sizes(), x.scalar_type());
  check(b, "depthwise bias", {shape.channels}, x.scalar_type());
}

void Depthwise::run(Activation activation, cpu::Image output, void* statistics) const {
  const auto& kernels = cpu::kernels<cpu::ConvKernels>();
  run_kernel(kernels.depthwise_workspace, kernels.depthwise_forward,
             {dtype, shape, activation, weight.const_data_ptr(), data_or_null(bias), input.image(), output,
              statistics, nullptr});
}

DepthwiseGradients depthwise_gradients(const Depthwise& conv, const DepthwiseGradientOf& of, bool want_input,
                                       bool want_weight, bool want_bias) {
  const DepthwiseShape& s = conv.shape;
  const Tensor& x = conv.input.tensor;
  DepthwiseGradients r;
  const auto format = conv_format(x, {conv.weight});
  const auto wide = x.options().dtype(wide_dtype(x));
  if (want_input) r.input = at::empty({s.batch, s.channels, s.height, s.width}, x.options(), format);
  if (want_weight || want_bias) {
    r.weight = at::empty({s.channels, s.kernel_h, s.kernel_w}, wide);
    r.bias = at::empty({s.channels}, wide);
  }
  if (s.batch * s.channels * s.out_height * s.out_width == 0) {
    for (Tensor* t : {&r.input, &r.weight, &r.bias})
      if (t->defined()) t->zero_();
  } else {
    const auto& kernels = cpu::kernels<cpu::ConvKernels>();
    run_kernel(kernels.depthwise_backward_workspace, kernels.depthwise_backward,
               {conv.dtype,
                s,
                of.activation,
                of.grad,
                of.blocked_grad,
                of.norm,
                conv.input.image(),
                conv.weight.const_data_ptr(),
                data_or_null(conv.bias),
                {mutable_data_or_null(r.input), format == at::MemoryFormat::ChannelsLast},
                mutable_data_or_null(r.weight),
                mutable_data_or_null(r.bias),
                nullptr});
  }
  if (want_input && s.multiplier > 1)
    r.input = r.input.contiguous()
                  .view({s.batch, s.channels / s.multiplier, s.multiplier, s.height, s.width})
                  .sum(2)
                  .contiguous(format);
  if (r.weight.defined()) r.weight = r.weight.view(conv.weight.sizes()).to(x.scalar_type());
  if (r.bias.defined()) r.bias = r.bias.to(x.scalar_type());
  return r;
}

namespace {

Tensor depthwise_conv2d_forward(const calls::DepthwiseForward& a) {
  const Depthwise conv(a.input, a.weight, a.bias, a.geometry);
  const Activation activation = activation_named(a.activation, "activation");
  const auto format = conv_format(a.input, {a.weight});
  Tensor out = at::empty(conv.out_sizes(), a.input.options(), format);
  if (out.numel() > 0)
    conv.run(activation, {out.mutable_data_ptr(), format == at::MemoryFormat::ChannelsLast}, nullptr);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(const calls::DepthwiseBackward& a) {
  const Depthwise conv(a.input, a.weight, a.bias, a.geometry);
  check(a.grad_output, "grad_output", conv.out_sizes(), a.input.scalar_type());
  const DenseImage grad(a.grad_output);
  const auto [input, weight, bias] = a.output_mask;
  const auto r = depthwise_gradients(conv, {activation_named(a.activation, "activation"), grad.image()},
                                     input, weight, bias);
  return {or_empty(input, r.input, a.input), or_empty(weight, r.weight, a.weight),
          or_empty(bias, r.bias, a.weight)};
}

}  // namespace

FUSEDNN_BINDINGS(cpu) {
  op(m, "depthwise_conv2d_forward", &depthwise_conv2d_forward);
  op(m, "depthwise_conv2d_backward", &depthwise_conv2d_backward);
}

}  // namespace fusednn
