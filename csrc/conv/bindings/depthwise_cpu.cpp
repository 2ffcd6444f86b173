// fusednn._C.cpu: depthwise convolution with its gradients.
#include "conv/bindings/depthwise_cpu.h"

#include <torch/csrc/utils/pybind.h>

namespace fusednn {

using at::Tensor;
using cpu::Activation;
using cpu::DepthwiseShape;

Depthwise::Depthwise(const Tensor& x, const Tensor& w, const OptionalTensor& b, const Pair& stride,
                     const Padding& padding, const Pair& dilation)
    : shape(depthwise_shape(x, w, stride, padding, dilation)),
      dtype(dtype_of(x, "input")),
      input(x),
      weight(w.contiguous()),
      bias(dense(b)) {
  check(b, "depthwise bias", {shape.channels}, x.scalar_type());
}

void Depthwise::run(Activation activation, cpu::Image output, void* statistics) const {
  const cpu::ConvKernels& kernels = cpu::conv_kernels();
  const cpu::Parallel threads = torch_parallel();
  cpu::DepthwiseForward p{
      dtype,  shape,      activation, weight.const_data_ptr(), data_or_null(bias), input.image(),
      output, statistics, nullptr};
  const Scratch scratch(kernels.depthwise_workspace(p, threads.threads));
  p.workspace = scratch.data();
  kernels.depthwise_forward(p, threads);
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
    const cpu::ConvKernels& kernels = cpu::conv_kernels();
    const cpu::Parallel threads = torch_parallel();
    cpu::DepthwiseBackward p{conv.dtype,
                             s,
                             of.activation,
                             of.grad,
                             of.blocked_grad,
                             of.norm,
                             conv.input.image(),
                             conv.weight.const_data_ptr(),
                             data_or_null(conv.bias),
                             {data(r.input), format == at::MemoryFormat::ChannelsLast},
                             data(r.weight),
                             data(r.bias),
                             nullptr};
    const Scratch scratch(kernels.depthwise_backward_workspace(p, threads.threads));
    p.workspace = scratch.data();
    kernels.depthwise_backward(p, threads);
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

Tensor depthwise_conv2d_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                                const Pair& stride, const Padding& padding, const Pair& dilation,
                                const std::string& activation) {
  const Depthwise conv(input, weight, bias, stride, padding, dilation);
  const Activation act = activation_named(activation, "activation");
  const auto format = conv_format(input, {weight});
  Tensor out = at::empty(conv.out_sizes(), input.options(), format);
  if (out.numel() > 0)
    conv.run(act, {out.mutable_data_ptr(), format == at::MemoryFormat::ChannelsLast}, nullptr);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(const Tensor& grad_output, const Tensor& input,
                                                             const Tensor& weight, const OptionalTensor& bias,
                                                             const Pair& stride, const Padding& padding,
                                                             const Pair& dilation,
                                                             const std::string& activation,
                                                             const std::array<bool, 3>& mask) {
  const Depthwise conv(input, weight, bias, stride, padding, dilation);
  check(grad_output, "grad_output", conv.out_sizes(), input.scalar_type());
  const DenseImage grad(grad_output);
  const auto r = depthwise_gradients(conv, {activation_named(activation, "activation"), grad.image()},
                                     mask[0], mask[1], mask[2]);
  return {or_empty(mask[0], r.input, input), or_empty(mask[1], r.weight, weight),
          or_empty(mask[2], r.bias, weight)};
}

}  // namespace

void bind_conv_depthwise_cpu(pybind11::module_& m) {
  const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("depthwise_conv2d_forward", &depthwise_conv2d_forward, unlocked);
  m.def("depthwise_conv2d_backward", &depthwise_conv2d_backward, unlocked);
}

}  // namespace fusednn
