// fusednn._C.cpu: training of the depthwise-separable block.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "conv/bindings/cpu.h"
#include "core/bindings/cpu_kernel.h"
#include "core/bindings/op.h"

namespace fusednn {
namespace {

using at::Tensor;
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
  cpu::kernels<cpu::ConvKernels>().merge_statistics(
      {dtype, channels, static_cast<int64_t>(counts.size()), count, counts.data(),
       n.present ? data_or_null(records.values) : nullptr, eps, data_or_null(n.weight), data_or_null(n.bias),
       mutable_data_or_null(n.mean), mutable_data_or_null(n.rstd), n.norm.mutable_data_ptr()},
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

BlockForward separable_conv2d_train_forward(const calls::TrainForward& a) {
  const auto& [input, w1, b1, norm1_weight, norm1_bias, w2, b2, norm2_weight, norm2_bias] = a.block;
  const calls::TrainOptions& o = a.options;
  const Depthwise conv(input, w1, b1, o.geometry);
  const DepthwiseShape& s = conv.shape;
  const Pointwise point(w2, b2, s, input);
  const int64_t C = s.channels, O = point.out_channels;
  BlockNorm norm1(o.has_norm1, norm1_weight, norm1_bias, C, input, "norm1"),
      norm2(o.has_norm2, norm2_weight, norm2_bias, O, input, "norm2");
  const Activation act1 = o.activations.depthwise(), act2 = o.activations.pointwise();
  const at::DimVector sizes{s.batch, O, s.out_height, s.out_width};
  check(a.residual, "residual", sizes, input.scalar_type());

  const auto format = conv_format(input, {w1, w2});
  const bool last = format == at::MemoryFormat::ChannelsLast;
  Tensor out = at::empty(sizes, input.options(), format);
  Tensor z2 = at::empty(sizes, input.options(), at::MemoryFormat::ChannelsLast);
  const Tensor saved = needs_z2(o.has_norm2, act2) ? z2 : z2.new_empty({0});
  const BlockForward result{out, saved, norm1.mean, norm1.rstd, norm2.mean, norm2.rstd};
  if (out.numel() == 0 || C == 0) {
    TORCH_CHECK(O == 0 || out.numel() == 0, "input: got no channels, expected at least one");
    return result;
  }
  const auto& kernels = cpu::kernels<cpu::ConvKernels>();
  const Records records1(kernels.depthwise_strips, s, o.has_norm1 ? C : 0, norm1);
  if (o.has_norm1) conv.run(Activation::none, {nullptr, true}, mutable_data_or_null(records1.values));
  merge(norm1, conv.dtype, C, records1, o.eps1);

  const Records records2(kernels.train_strips, s, o.has_norm2 ? O : 0, norm2);
  run_kernel(
      kernels.pointwise_forward_workspace, kernels.pointwise_forward,
      {conv.dtype, s, O, act1, conv.input.image(), conv.weight.const_data_ptr(), data_or_null(conv.bias),
       norm1.norm.const_data_ptr(), point.weight.const_data_ptr(), data_or_null(point.bias),
       z2.mutable_data_ptr(), mutable_data_or_null(records2.values), nullptr});
  merge(norm2, conv.dtype, O, records2, o.eps2);

  const Tensor add = a.residual ? a.residual->contiguous(format) : Tensor();
  run_kernel(kernels.norm_activation_workspace, kernels.norm_activation,
             {conv.dtype,
              s.batch,
              point.area,
              O,
              act2,
              z2.const_data_ptr(),
              norm2.norm.const_data_ptr(),
              {const_cast<void*>(data_or_null(add)), last},
              {out.mutable_data_ptr(), last},
              nullptr});
  return result;
}

namespace {

struct NormGradients {
  Tensor weight, bias, coefficients;
  NormGradients(const BlockNorm& n, DType dtype, int64_t channels, const Tensor& sums, int64_t count) {
    const auto wide = n.norm.options();
    weight = at::empty({channels}, wide);
    bias = at::empty({channels}, wide);
    coefficients = at::empty({4, padded_channels(channels)}, wide);
    cpu::kernels<cpu::ConvKernels>().norm_coefficients(
        {dtype, channels, sums.defined() ? sums.size(0) : 0, count, data_or_null(sums),
         n.present ? n.mean.const_data_ptr() : nullptr, data_or_null(n.rstd), data_or_null(n.weight),
         mutable_data_or_null(weight), mutable_data_or_null(bias), coefficients.mutable_data_ptr()},
        torch_parallel());
  }
};

}  // namespace

BlockGradients separable_conv2d_train_backward(const calls::TrainBackward& a) {
  const auto& [input, w1, b1, norm1_weight, norm1_bias, w2, b2, norm2_weight, norm2_bias] = a.block;
  const auto& mask = a.output_mask;
  const Depthwise conv(input, w1, b1, a.geometry);
  const DepthwiseShape& s = conv.shape;
  const Pointwise point(w2, b2, s, input);
  const int64_t C = s.channels, O = point.out_channels, count = s.batch * point.area;
  BlockNorm norm1(a.has_norm1, norm1_weight, norm1_bias, C, input, "norm1"),
      norm2(a.has_norm2, norm2_weight, norm2_bias, O, input, "norm2");
  const Activation act1 = a.activations.depthwise(), act2 = a.activations.pointwise();
  const auto type = input.scalar_type();
  const at::DimVector sizes{s.batch, O, s.out_height, s.out_width};
  check(a.grad_out, "grad_out", sizes, type);
  if (needs_z2(a.has_norm2, act2)) check(a.z2, "z2", sizes, type);
  for (const auto& [t, name, present, channels] :
       {std::tuple(&a.mean1, "mean1", a.has_norm1, C), std::tuple(&a.rstd1, "rstd1", a.has_norm1, C),
        std::tuple(&a.mean2, "mean2", a.has_norm2, O), std::tuple(&a.rstd2, "rstd2", a.has_norm2, O)})
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
  restore(norm1, C, a.mean1, a.rstd1);
  restore(norm2, O, a.mean2, a.rstd2);
  const DenseImage grad(a.grad_out);
  // Without norm and activation nothing depends on z2: any values do.
  const Tensor z2 = channels_last(needs_z2(a.has_norm2, act2) ? a.z2 : a.grad_out);
  const auto& kernels = cpu::kernels<cpu::ConvKernels>();
  const auto wide = norm1.norm.options();
  const int64_t strips = kernels.train_strips(s, nullptr);

  Tensor sums2;
  if (a.has_norm2) {
    sums2 = at::empty({strips, 2, padded_channels(O)}, wide);
    run_kernel(kernels.norm_sums_workspace, kernels.norm_sums,
               {conv.dtype, s, O, act2, grad.image(), z2.const_data_ptr(), norm2.norm.const_data_ptr(),
                sums2.mutable_data_ptr(), nullptr});
  }
  const NormGradients g2(norm2, conv.dtype, O, sums2, count);

  const Tensor sums1 = at::empty({strips, 2, padded_channels(C)}, wide);
  const Tensor grad_w2 = at::empty({O, C}, wide), grad_b2 = at::empty({O}, wide);
  const Scratch da1(count * padded_channels(C) * wide.dtype().itemsize());
  run_kernel(
      kernels.pointwise_backward_workspace, kernels.pointwise_backward,
      {conv.dtype, s, O, act1, act2, grad.image(), conv.input.image(), conv.weight.const_data_ptr(),
       data_or_null(conv.bias), z2.const_data_ptr(), norm1.norm.const_data_ptr(), norm2.norm.const_data_ptr(),
       a.has_norm2 ? g2.coefficients.const_data_ptr() : nullptr, point.weight.const_data_ptr(), da1.data(),
       sums1.mutable_data_ptr(), grad_w2.mutable_data_ptr(), grad_b2.mutable_data_ptr(), nullptr});
  const NormGradients g1(norm1, conv.dtype, C, sums1, count);
  DepthwiseGradientOf behind;
  behind.blocked_grad = da1.data();
  behind.norm = a.has_norm1 ? g1.coefficients.const_data_ptr() : nullptr;
  const auto d = depthwise_gradients(conv, behind, mask[0], mask[1], mask[2]);
  return {or_empty(mask[0], d.input, input), or_empty(mask[1], d.weight, w1),
          or_empty(mask[2], d.bias, w1),     as_bias(3, g1.weight, norm1_weight),
          as_bias(4, g1.bias, norm1_bias),   as(5, grad_w2, w2),
          as_bias(6, grad_b2, b2),           as_bias(7, g2.weight, norm2_weight),
          as_bias(8, g2.bias, norm2_bias)};
}

FUSEDNN_BINDINGS(cpu) {
  op(m, "separable_conv2d_train_forward", &separable_conv2d_train_forward);
  op(m, "separable_conv2d_train_backward", &separable_conv2d_train_backward);
}

}  // namespace fusednn
