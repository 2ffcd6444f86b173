// fusednn._C.cpu: training of the depthwise-separable block.
#include <torch/csrc/utils/pybind.h>

#include "conv/bindings/depthwise_cpu.h"

namespace fusednn {
namespace {

using at::Tensor;
using cpu::Activation;
using cpu::DepthwiseShape;
using cpu::padded_channels;

Tensor channels_last(const Tensor& t) { return t.contiguous(at::MemoryFormat::ChannelsLast); }

// A norm of the block: its parameters, its statistics, and what the kernels make of them.
struct BlockNorm {
  bool present;
  OptionalTensor weight, bias;
  Tensor mean, rstd, norm;

  BlockNorm(bool has, const OptionalTensor& w, const OptionalTensor& b, int64_t channels, const Tensor& like,
            const char* name)
      : present(has) {
    // Under autocast the norm's parameters stay float32 beside an input of 16 bits.
    const auto wide = like.options().dtype(wide_dtype(like));
    for (const OptionalTensor* t : {&w, &b})
      if (*t)
        check(**t, name, {channels},
              (*t)->scalar_type() == at::kFloat ? wide_dtype(like) : like.scalar_type());
    if (w) weight = w->to(wide.dtype()).contiguous();
    if (b) bias = b->to(wide.dtype()).contiguous();
    norm = at::empty({3, padded_channels(channels)}, wide);
    mean = at::empty({has ? channels : 0}, wide);
    rstd = at::empty_like(mean);
  }
};

// Statistics by strips; without channels, none.
struct Records {
  std::vector<int64_t> counts;
  Tensor values;

  Records(int64_t (*strips)(const DepthwiseShape&, int64_t*), const DepthwiseShape& s, int64_t channels,
          const BlockNorm& n)
      : counts(strips(s, nullptr)) {
    strips(s, counts.data());
    if (channels > 0)
      values =
          at::empty({static_cast<int64_t>(counts.size()), 2, padded_channels(channels)}, n.norm.options());
  }
};

void merge(BlockNorm& n, DType dtype, int64_t channels, const Records& records, double eps) {
  const std::vector<int64_t>& counts = records.counts;
  int64_t count = 0;
  for (const int64_t c : counts) count += c;
  cpu::conv_kernels().merge_statistics(
      {dtype, channels, static_cast<int64_t>(counts.size()), count, counts.data(),
       n.present ? const_data(records.values) : nullptr, eps, data_or_null(n.weight), data_or_null(n.bias),
       data(n.mean), data(n.rstd), n.norm.mutable_data_ptr()},
      torch_parallel());
}

// The norm as the forward applied it, from the statistics that it found.
void restore(BlockNorm& n, int64_t channels, const Tensor& mean, const Tensor& rstd) {
  n.norm.zero_();
  n.norm.select(0, 1).fill_(1);
  if (!n.present) return;
  n.mean = mean.contiguous();
  n.rstd = rstd.contiguous();
  const auto part = [&](int i) { return n.norm.select(0, i).narrow(0, 0, channels); };
  part(0).copy_(n.mean);
  part(1).copy_(n.weight ? n.rstd * *n.weight : n.rstd);
  if (n.bias) part(2).copy_(*n.bias);
}

bool needs_z2(bool has_norm2, Activation act2) { return has_norm2 || act2 != Activation::none; }

struct Pointwise {
  Tensor weight;
  OptionalTensor bias;
  int64_t out_channels, area;

  Pointwise(const Tensor& w, const OptionalTensor& b, const DepthwiseShape& s, const Tensor& like)
      : weight(w.contiguous()), bias(dense(b)), out_channels(w.size(0)), area(s.out_height * s.out_width) {
    check(w, "pointwise weight", {out_channels, s.channels, 1, 1}, like.scalar_type());
    check(b, "pointwise bias", {out_channels}, like.scalar_type());
  }
};

}  // namespace

BlockForward separable_conv2d_train_forward(const Tensor& input, const Tensor& w1, const OptionalTensor& b1,
                                            const OptionalTensor& norm1_weight,
                                            const OptionalTensor& norm1_bias, const Tensor& w2,
                                            const OptionalTensor& b2, const OptionalTensor& norm2_weight,
                                            const OptionalTensor& norm2_bias, const OptionalTensor& residual,
                                            const Pair& stride, const Padding& padding, const Pair& dilation,
                                            double eps1, double eps2, const std::string& depthwise_activation,
                                            const std::string& pointwise_activation, bool has_norm1,
                                            bool has_norm2) {
  const Depthwise conv(input, w1, b1, stride, padding, dilation);
  const DepthwiseShape& s = conv.shape;
  const Pointwise point(w2, b2, s, input);
  const int64_t C = s.channels, O = point.out_channels;
  BlockNorm norm1(has_norm1, norm1_weight, norm1_bias, C, input, "norm1"),
      norm2(has_norm2, norm2_weight, norm2_bias, O, input, "norm2");
  const Activation act1 = activation_named(depthwise_activation, "depthwise_activation"),
                   act2 = activation_named(pointwise_activation, "pointwise_activation");
  const at::DimVector sizes{s.batch, O, s.out_height, s.out_width};
  check(residual, "residual", sizes, input.scalar_type());

  const auto format = conv_format(input, {w1, w2});
  const bool last = format == at::MemoryFormat::ChannelsLast;
  Tensor out = at::empty(sizes, input.options(), format);
  Tensor z2 = at::empty(sizes, input.options(), at::MemoryFormat::ChannelsLast);
  if (out.numel() == 0 || C == 0) {
    TORCH_CHECK(O == 0 || out.numel() == 0, "input: got no channels, expected at least one");
    return {out,       needs_z2(has_norm2, act2) ? z2 : z2.new_empty({0}), norm1.mean, norm1.rstd, norm2.mean,
            norm2.rstd};
  }
  const cpu::ConvKernels& kernels = cpu::conv_kernels();
  const cpu::Parallel threads = torch_parallel();

  const Records records1(kernels.depthwise_strips, s, has_norm1 ? C : 0, norm1);
  if (has_norm1) conv.run(Activation::none, {nullptr, true}, data(records1.values));
  merge(norm1, conv.dtype, C, records1, eps1);

  const Records records2(kernels.train_strips, s, has_norm2 ? O : 0, norm2);
  cpu::PointwiseForward p{conv.dtype,
                          s,
                          O,
                          act1,
                          conv.input.image(),
                          conv.weight.const_data_ptr(),
                          data_or_null(conv.bias),
                          norm1.norm.const_data_ptr(),
                          point.weight.const_data_ptr(),
                          data_or_null(point.bias),
                          z2.mutable_data_ptr(),
                          data(records2.values),
                          nullptr};
  {
    const Scratch scratch(kernels.pointwise_forward_workspace(p, threads.threads));
    p.workspace = scratch.data();
    kernels.pointwise_forward(p, threads);
  }
  merge(norm2, conv.dtype, O, records2, eps2);

  const Tensor add = residual ? residual->contiguous(format) : Tensor();
  cpu::NormActivation a{conv.dtype,
                        s.batch,
                        point.area,
                        O,
                        act2,
                        z2.const_data_ptr(),
                        norm2.norm.const_data_ptr(),
                        {const_cast<void*>(const_data(add)), last},
                        {out.mutable_data_ptr(), last},
                        nullptr};
  const Scratch scratch(kernels.norm_activation_workspace(a, threads.threads));
  a.workspace = scratch.data();
  kernels.norm_activation(a, threads);
  return {out,       needs_z2(has_norm2, act2) ? z2 : z2.new_empty({0}), norm1.mean, norm1.rstd, norm2.mean,
          norm2.rstd};
}

namespace {

struct NormGradients {
  Tensor weight, bias, coefficients;
  NormGradients(const BlockNorm& n, DType dtype, int64_t channels, const Tensor& sums, int64_t count) {
    const auto wide = n.norm.options();
    weight = at::empty({channels}, wide);
    bias = at::empty({channels}, wide);
    coefficients = at::empty({4, padded_channels(channels)}, wide);
    cpu::conv_kernels().norm_coefficients(
        {dtype, channels, sums.defined() ? sums.size(0) : 0, count, const_data(sums),
         n.present ? n.mean.const_data_ptr() : nullptr, const_data(n.rstd), data_or_null(n.weight),
         data(weight), data(bias), coefficients.mutable_data_ptr()},
        torch_parallel());
  }
};

}  // namespace

BlockGradients separable_conv2d_train_backward(
    const Tensor& grad_out, const Tensor& input, const Tensor& w1, const OptionalTensor& b1,
    const OptionalTensor& norm1_weight, const OptionalTensor& norm1_bias, const Tensor& w2,
    const OptionalTensor& b2, const OptionalTensor& norm2_weight, const OptionalTensor& norm2_bias,
    const Tensor& z2_, const Tensor& mean1, const Tensor& rstd1, const Tensor& mean2, const Tensor& rstd2,
    const Pair& stride, const Padding& padding, const Pair& dilation, const std::string& depthwise_activation,
    const std::string& pointwise_activation, bool has_norm1, bool has_norm2,
    const std::array<bool, 9>& mask) {
  const Depthwise conv(input, w1, b1, stride, padding, dilation);
  const DepthwiseShape& s = conv.shape;
  const Pointwise point(w2, b2, s, input);
  const int64_t C = s.channels, O = point.out_channels, count = s.batch * point.area;
  BlockNorm norm1(has_norm1, norm1_weight, norm1_bias, C, input, "norm1"),
      norm2(has_norm2, norm2_weight, norm2_bias, O, input, "norm2");
  const Activation act1 = activation_named(depthwise_activation, "depthwise_activation"),
                   act2 = activation_named(pointwise_activation, "pointwise_activation");
  const auto type = input.scalar_type();
  const at::DimVector sizes{s.batch, O, s.out_height, s.out_width};
  check(grad_out, "grad_out", sizes, type);
  if (needs_z2(has_norm2, act2)) check(z2_, "z2", sizes, type);
  for (const auto& [t, name, present, channels] :
       {std::tuple(&mean1, "mean1", has_norm1, C), std::tuple(&rstd1, "rstd1", has_norm1, C),
        std::tuple(&mean2, "mean2", has_norm2, O), std::tuple(&rstd2, "rstd2", has_norm2, O)})
    if (present) check(*t, name, {channels}, wide_dtype(input));
  const auto as = [&](int i, const Tensor& t, const Tensor& like) {
    return mask[i] ? t.reshape(like.sizes()).to(type) : at::empty({0}, input.options());
  };
  const auto as_bias = [&](int i, const Tensor& t, const OptionalTensor& like) {
    return mask[i] ? t.to(like ? like->scalar_type() : type) : at::empty({0}, input.options());
  };
  if (count * C * O == 0) {
    const auto zeros = [&](int i, const Tensor& like) { return as(i, at::zeros_like(like), like); };
    const auto zero_vector = [&](int i, int64_t n, const OptionalTensor& like) {
      return as_bias(i, at::zeros({n}, input.options()), like);
    };
    const auto format = conv_format(input, {w1});
    return {
        mask[0] ? at::empty(input.sizes(), input.options(), format).zero_() : at::empty({0}, input.options()),
        zeros(1, w1),
        zero_vector(2, C, b1),
        zero_vector(3, C, norm1_weight),
        zero_vector(4, C, norm1_bias),
        zeros(5, w2),
        zero_vector(6, O, b2),
        zero_vector(7, O, norm2_weight),
        zero_vector(8, O, norm2_bias)};
  }
  restore(norm1, C, mean1, rstd1);
  restore(norm2, O, mean2, rstd2);
  const DenseImage grad(grad_out);
  // Without norm and activation nothing depends on z2: any values do.
  const Tensor z2 = channels_last(needs_z2(has_norm2, act2) ? z2_ : grad_out);
  const cpu::ConvKernels& kernels = cpu::conv_kernels();
  const cpu::Parallel threads = torch_parallel();
  const auto wide = norm1.norm.options();
  const int64_t strips = kernels.train_strips(s, nullptr);

  Tensor sums2;
  if (has_norm2) {
    sums2 = at::empty({strips, 2, padded_channels(O)}, wide);
    cpu::NormSums p{conv.dtype,
                    s,
                    O,
                    act2,
                    grad.image(),
                    z2.const_data_ptr(),
                    norm2.norm.const_data_ptr(),
                    sums2.mutable_data_ptr(),
                    nullptr};
    const Scratch scratch(kernels.norm_sums_workspace(p, threads.threads));
    p.workspace = scratch.data();
    kernels.norm_sums(p, threads);
  }
  const NormGradients g2(norm2, conv.dtype, O, sums2, count);

  const Tensor sums1 = at::empty({strips, 2, padded_channels(C)}, wide);
  const Tensor grad_w2 = at::empty({O, C}, wide), grad_b2 = at::empty({O}, wide);
  const Scratch da1(count * padded_channels(C) * wide.dtype().itemsize());
  cpu::PointwiseBackward p{conv.dtype,
                           s,
                           O,
                           act1,
                           act2,
                           grad.image(),
                           conv.input.image(),
                           conv.weight.const_data_ptr(),
                           data_or_null(conv.bias),
                           z2.const_data_ptr(),
                           norm1.norm.const_data_ptr(),
                           norm2.norm.const_data_ptr(),
                           has_norm2 ? g2.coefficients.const_data_ptr() : nullptr,
                           point.weight.const_data_ptr(),
                           da1.data(),
                           sums1.mutable_data_ptr(),
                           grad_w2.mutable_data_ptr(),
                           grad_b2.mutable_data_ptr(),
                           nullptr};
  {
    const Scratch scratch(kernels.pointwise_backward_workspace(p, threads.threads));
    p.workspace = scratch.data();
    kernels.pointwise_backward(p, threads);
  }
  const NormGradients g1(norm1, conv.dtype, C, sums1, count);
  DepthwiseGradientOf behind;
  behind.blocked_grad = da1.data();
  behind.norm = has_norm1 ? g1.coefficients.const_data_ptr() : nullptr;
  const auto d = depthwise_gradients(conv, behind, mask[0], mask[1], mask[2]);
  return {or_empty(mask[0], d.input, input), or_empty(mask[1], d.weight, w1),
          or_empty(mask[2], d.bias, w1),     as_bias(3, g1.weight, norm1_weight),
          as_bias(4, g1.bias, norm1_bias),   as(5, grad_w2, w2),
          as_bias(6, grad_b2, b2),           as_bias(7, g2.weight, norm2_weight),
          as_bias(8, g2.bias, norm2_bias)};
}

void bind_conv_train_cpu(pybind11::module_& m) {
  const auto unlocked = pybind11::call_guard<pybind11::gil_scoped_release>();
  m.def("separable_conv2d_train_forward", &separable_conv2d_train_forward, unlocked);
  m.def("separable_conv2d_train_backward", &separable_conv2d_train_backward, unlocked);
}

}  // namespace fusednn
