// Python face of the CUDA launchers of the conv family; schemas as in fusednn/conv/ops.py.
//
// Device-agnostic: the tensors' device decides the guard, current_stream the stream.
#include <ATen/Context.h>
#include <ATen/ops/empty_like.h>
#include <cuda_runtime_api.h>

#include <limits>
#include <tuple>

#include "conv/bindings/calls.h"
#include "conv/cuda/params.h"
#include "core/bindings/cuda_arguments.h"
#include "core/bindings/op.h"

namespace fusednn {
namespace {

using at::Tensor;
using cuda::DepthwiseShape;

// A depthwise call's tensors, checked: dense, and all images in the format of the result.
class Convolution : public CheckedArguments {
 public:
  Convolution(const char* op, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
              const calls::Geometry& geometry, const OptionalTensor& other_weight = {})
      : CheckedArguments(op, "input", input) {
    TORCH_CHECK(input.dim() == 4, op, ": input: got shape ", input.sizes(), ", expected [N, C, H, W]");
    TORCH_CHECK(weight.dim() == 4 && weight.size(1) == 1 && weight.size(2) > 0 && weight.size(3) > 0, op,
                ": weight: got shape ", weight.sizes(), ", expected [C m, 1, kh, kw]");
    const int64_t in_channels = input.size(1), channels = weight.size(0);
    TORCH_CHECK(in_channels > 0 ? channels % in_channels == 0 : channels == 0, op, ": weight: got ", channels,
                " channels, expected a multiple of the input's ", in_channels);
    const bool last = is_last(input) || is_last(weight) || (other_weight && is_last(*other_weight));
    format_ = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    set_shape(input, weight, geometry);
    input_ = input.contiguous(format_);
    weight_ = dense("weight", weight, weight.sizes());
    bias_ = dense("bias", bias, {channels});
  }

  const DepthwiseShape& shape() const { return shape_; }
  const void* input() const { return input_.const_data_ptr(); }
  const void* weight() const { return weight_.const_data_ptr(); }
  const void* bias() const { return data_or_null(bias_); }

  // An image of the result's size in its format.
  template <class MaybeTensor>
  MaybeTensor image(const char* name, const MaybeTensor& t, int64_t channels) const {
    return dense(name, t, {shape_.batch, channels, shape_.out_height, shape_.out_width}, format_);
  }

  Tensor empty_image(int64_t channels) const {
    return at::empty({shape_.batch, channels, shape_.out_height, shape_.out_width}, options(), format_);
  }

  Tensor empty_input() const { return at::empty_like(input_, options(), format_); }

 private:
  static bool is_last(const Tensor& t) { return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast; }

  void set_shape(const Tensor& input, const Tensor& weight, const calls::Geometry& geometry) {
    const auto& [stride, padding, dilation] = geometry;
    DepthwiseShape& s = shape_;
    s.batch = input.size(0);
    s.channels = small("channels", weight.size(0));
    s.multiplier = static_cast<int>(s.channels == 0 ? 1 : s.channels / input.size(1));
    s.height = small("height", input.size(2)), s.width = small("width", input.size(3));
    s.kernel_h = small("weight's height", weight.size(2)),
    s.kernel_w = small("weight's width", weight.size(3));
    s.stride_h = small("stride", stride[0]), s.stride_w = small("stride", stride[1]);
    s.dilation_h = small("dilation", dilation[0]), s.dilation_w = small("dilation", dilation[1]);
    s.pad_top = small("padding", padding[0]), s.pad_left = small("padding", padding[2]);
    s.channels_last = format_ == at::MemoryFormat::ChannelsLast;
    TORCH_CHECK(s.stride_h > 0 && s.stride_w > 0, op(), ": stride: got ", at::IntArrayRef(stride),
                ", expected at least 1");
    TORCH_CHECK(s.dilation_h > 0 && s.dilation_w > 0, op(), ": dilation: got ", at::IntArrayRef(dilation),
                ", expected at least 1");
    const auto outputs = [&](int64_t size, int64_t pad, int64_t kernel, int64_t step, int64_t spread) {
      const int64_t reach = spread * (kernel - 1) + 1;
      small("dilated kernel", reach);
      TORCH_CHECK(size + pad >= reach, op(), ": input: got ", size + pad,
                  " rows or columns with padding, expected at least the kernel's ", reach);
      return small("output's size", (size + pad - reach) / step + 1);
    };
    s.out_height =
        outputs(s.height, padding[0] + small("padding", padding[1]), s.kernel_h, s.stride_h, s.dilation_h);
    s.out_width =
        outputs(s.width, padding[2] + small("padding", padding[3]), s.kernel_w, s.stride_w, s.dilation_w);
    TORCH_CHECK(s.batch * std::max(s.height, s.out_height) <= std::numeric_limits<int>::max(), op(),
                ": input: got ", s.batch, " images of ", s.height,
                " rows, expected less than 2^31 rows together");
  }

  DepthwiseShape shape_{};
  at::MemoryFormat format_;
  Tensor input_, weight_;
  OptionalTensor bias_;
};

Tensor depthwise_conv2d_forward(const calls::DepthwiseForward& a) {
  const c10::DeviceGuard guard(a.input.device());
  const Convolution conv("depthwise_conv2d_forward", a.input, a.weight, a.bias, a.geometry);
  Tensor out = conv.empty_image(conv.shape().channels);
  launched(conv,
           cuda::depthwise_forward({conv.dtype(), conv.shape(), activation_named(a.activation, "activation"),
                                    conv.input(), conv.weight(), conv.bias(), out.mutable_data_ptr()},
                                   current_stream(a.input)));
  return out;
}

// The gradient of the convolution's result before its activation.
Tensor grad_before_activation(const Convolution& conv, const Tensor& grad_output, Activation activation,
                              CUstream_st* stream) {
  const Tensor grad = conv.image("grad_output", grad_output, conv.shape().channels);
  if (activation == Activation::none) return grad;
  Tensor grad_z = conv.empty_image(conv.shape().channels);
  launched(conv, cuda::depthwise_forward({conv.dtype(), conv.shape(), activation, conv.input(), conv.weight(),
                                          conv.bias(), grad_z.mutable_data_ptr(), grad.const_data_ptr()},
                                         stream));
  return grad_z;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(const calls::DepthwiseBackward& a) {
  const Tensor &input = a.input, &weight = a.weight;
  const c10::DeviceGuard guard(input.device());
  const auto [needs_input, needs_weight, needs_bias] = a.output_mask;
  Tensor grad_input = at::empty({0}, input.options()), grad_weight = at::empty({0}, input.options()),
         grad_bias = at::empty({0}, input.options());
  if (!needs_input && !needs_weight && !needs_bias) return {grad_input, grad_weight, grad_bias};

  const Convolution conv("depthwise_conv2d_backward", input, weight, a.bias, a.geometry);
  const DepthwiseShape& shape = conv.shape();
  CUstream_st* stream = current_stream(input);
  const Tensor grad_z =
      grad_before_activation(conv, a.grad_output, activation_named(a.activation, "activation"), stream);
  if (needs_input) {
    grad_input = conv.empty_input();
    launched(conv, cuda::depthwise_grad_input({conv.dtype(), shape, grad_z.const_data_ptr(), conv.weight(),
                                               grad_input.mutable_data_ptr()},
                                              stream));
  }
  if (needs_weight || needs_bias) {
    const int splits = cuda::depthwise_grad_weight_splits(shape);
    Tensor partials =
        at::empty({splits, shape.kernel_h * shape.kernel_w + 1, shape.channels}, conv.wide_options());
    Tensor dense = at::empty(weight.sizes(), conv.options());
    if (needs_bias) grad_bias = at::empty({shape.channels}, conv.options());
    launched(conv, cuda::depthwise_grad_weight(
                       {conv.dtype(), shape, grad_z.const_data_ptr(), conv.input(), splits,
                        partials.mutable_data_ptr(), needs_weight ? dense.mutable_data_ptr() : nullptr,
                        needs_bias ? grad_bias.mutable_data_ptr() : nullptr},
                       stream));
    if (needs_weight) {
      grad_weight = at::empty_like(weight);
      if (grad_weight.is_contiguous()) {
        grad_weight = dense;
      } else {
        grad_weight.copy_(dense);
      }
    }
  }
  return {grad_input, grad_weight, grad_bias};
}

// Why separable_conv2d_forward can't take such a call; empty if it can.
std::vector<std::string> separable_conv2d_limits(const Tensor& input, const Tensor& depthwise_weight,
                                                 const Tensor& pointwise_weight) {
  std::vector<std::string> reasons;
  const auto limit = [&](const char* what, int64_t got, int64_t most) {
    if (got > most) {
      reasons.push_back(c10::str("got ", got, " ", what, ", the fused kernel takes at most ", most, " of ",
                                 input.scalar_type()));
    }
  };
  limit("output channels", pointwise_weight.size(0), cuda::separable_most_outputs(dtype_of(input, "input")));
  limit("taps", depthwise_weight.size(2) * depthwise_weight.size(3), cuda::kSeparableMostTaps);
  return reasons;
}

Tensor separable_conv2d_forward(const calls::SeparableForward& a) {
  const auto& [input, depthwise_weight, depthwise_bias, pointwise_weight, pointwise_bias, residual, geometry,
               activations] = a;
  constexpr const char* op = "separable_conv2d_forward";
  const c10::DeviceGuard guard(input.device());
  const Convolution conv(op, input, depthwise_weight, depthwise_bias, geometry, pointwise_weight);
  for (const std::string& reason : separable_conv2d_limits(input, depthwise_weight, pointwise_weight)) {
    TORCH_CHECK(false, op, ": ", reason);
  }
  const int64_t outputs = pointwise_weight.size(0);
  const Tensor pointwise =
      conv.dense("pointwise_weight", pointwise_weight, {outputs, conv.shape().channels, 1, 1});
  const OptionalTensor bias = conv.dense("pointwise_bias", pointwise_bias, {outputs});
  const OptionalTensor added = conv.image("residual", residual, outputs);
  Tensor out = conv.empty_image(outputs);
  launched(conv, cuda::separable_forward(
                     {conv.dtype(), conv.shape(), static_cast<int>(outputs), activations.depthwise(),
                      activations.pointwise(), conv.input(), conv.weight(), conv.bias(),
                      pointwise.const_data_ptr(), data_or_null(bias), data_or_null(added),
                      out.mutable_data_ptr(), at::globalContext().allowTF32CuBLAS()},
                     current_stream(input)));
  return out;
}

}  // namespace

FUSEDNN_BINDINGS(cuda) {
  op(m, "depthwise_conv2d_forward", &depthwise_conv2d_forward);
  op(m, "depthwise_conv2d_backward", &depthwise_conv2d_backward);
  op(m, "separable_conv2d_forward", &separable_conv2d_forward);
  m.def("separable_conv2d_limits", &separable_conv2d_limits);
}

}  // namespace fusednn
