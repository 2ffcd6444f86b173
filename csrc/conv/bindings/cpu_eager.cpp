// The eager shortcut of the depthwise-separable block on CPU tensors (core/bindings/eager.h), with the
// running statistics, and with the norms folded in inference.
#include <ATen/TensorOperators.h>

#include "conv/bindings/cpu.h"
#include "core/bindings/eager.h"

namespace fusednn {
namespace {

using at::Tensor;

// What a block is, beside its tensors.
struct BlockOptions {
  int64_t in_channels;
  calls::Geometry geometry;
  calls::Activations activations;
  bool residual;
};

// A BatchNorm2d: its buffers are left out where it neither reads nor tracks them.
struct BatchNorm {
  bool present;
  OptionalTensor weight, bias, running_mean, running_var, num_batches_tracked;
  std::optional<double> momentum;
  double eps;
  FUSEDNN_ARGUMENTS(present, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
};

struct Block {
  std::shared_ptr<BlockOptions> options;
  Tensor input, weight1;
  OptionalTensor bias1;
  BatchNorm norm1;
  Tensor weight2;
  OptionalTensor bias2;
  BatchNorm norm2;
  FUSEDNN_ARGUMENTS(options, input, weight1, bias1, norm1, weight2, bias2, norm2)
};

int64_t out_size(int64_t size, int64_t padding, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t room = size + padding - dilation * (kernel - 1) - 1;
  return size <= 0 || kernel <= 0 || room < 0 ? 0 : room / stride + 1;
}

// Sizes of the result; empty where the arguments don't fit each other.
at::DimVector result_sizes(const BlockOptions& o, const Tensor& input, const Tensor& weight1,
                           const Tensor& weight2) {
  if (input.dim() != 4 || weight1.dim() != 4 || weight2.dim() != 4) return {};
  if (input.numel() == 0 || input.size(1) != o.in_channels || weight1.size(0) % o.in_channels != 0) return {};
  const auto& [stride, padding, dilation] = o.geometry;
  const auto size = [&](int i) {
    return out_size(input.size(2 + i), padding[2 * i] + padding[2 * i + 1], weight1.size(2 + i), stride[i],
                    dilation[i]);
  };
  const at::DimVector sizes{input.size(0), weight2.size(0), size(0), size(1)};
  if (c10::multiply_integers(sizes) == 0) return {};
  return o.residual && input.sizes() != sizes ? at::DimVector() : sizes;
}

// A product's tensors, and its norm's parameters.
void look_at(PlainCall& call, const Tensor& weight, at::IntArrayRef sizes, const OptionalTensor& bias,
             const BatchNorm& norm) {
  call(weight, sizes);
  call(bias, sizes[0]);
  call(norm.weight, sizes[0]);
  call(norm.bias, sizes[0]);
}

bool can_track(const BatchNorm& n, const Tensor& input, int64_t channels) {
  const auto wide = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto writable = [](const Tensor& t) {
    return plain(t) && !t.is_inference() && !t.requires_grad() && t.is_contiguous();
  };
  if (n.running_mean.has_value() != n.running_var.has_value()) return false;
  for (const OptionalTensor* t : {&n.running_mean, &n.running_var})
    if (*t && (!writable(**t) || (*t)->scalar_type() != wide || (*t)->sizes() != channels)) return false;
  const OptionalTensor& batches = n.num_batches_tracked;
  return !batches || (writable(*batches) && batches->scalar_type() == at::kLong && batches->numel() == 1);
}

// A plain call of consistent shapes, and whether it is recorded; the result's sizes go to `sizes`.
std::optional<bool> plain_block(const Block& b, at::DimVector& sizes) {
  PlainCall call(b.input);
  if (!call.ok()) return std::nullopt;
  sizes = result_sizes(*b.options, b.input, b.weight1, b.weight2);
  if (sizes.empty()) return std::nullopt;
  const int64_t channels = b.weight1.size(0);
  look_at(call, b.weight1, {channels, 1, b.weight1.size(2), b.weight1.size(3)}, b.bias1, b.norm1);
  look_at(call, b.weight2, {sizes[1], channels, 1, 1}, b.bias2, b.norm2);
  if (!call.ok() || !can_track(b.norm1, b.input, channels) || !can_track(b.norm2, b.input, sizes[1]))
    return std::nullopt;
  if ((b.norm1.present || b.norm2.present) && sizes[0] * sizes[2] * sizes[3] == 1) return std::nullopt;
  return call.recorded();
}

// As fusednn/conv/batch_norm.py's `track`, to the bit.
template <class T>
void track(const BatchNorm& n, const Tensor& mean, const Tensor& rstd, int64_t count) {
  const double factor = n.momentum.value_or(0.0);
  T keep = static_cast<T>(1 - factor), take = static_cast<T>(factor);
  if (n.num_batches_tracked) {
    const int64_t batches = ++*n.num_batches_tracked->mutable_data_ptr<int64_t>();
    n.num_batches_tracked->unsafeGetTensorImpl()->bump_version();
    if (!n.momentum) {
      take = T(1) / static_cast<T>(batches);
      keep = T(1) - take;
    }
  }
  if (!n.running_mean) return;
  const T eps = static_cast<T>(n.eps), unbias = static_cast<T>(static_cast<double>(count) / (count - 1));
  const T *m = mean.const_data_ptr<T>(), *r = rstd.const_data_ptr<T>();
  T *running_mean = n.running_mean->mutable_data_ptr<T>(),
    *running_var = n.running_var->mutable_data_ptr<T>();
  for (int64_t c = 0; c < mean.numel(); ++c) {
    const T variance = T(1) / (r[c] * r[c]) - eps;
    const T now = (variance < 0 ? T(0) : variance) * unbias;
    running_mean[c] = running_mean[c] * keep + m[c] * take;
    running_var[c] = running_var[c] * keep + now * take;
  }
  for (const OptionalTensor* t : {&n.running_mean, &n.running_var})
    (*t)->unsafeGetTensorImpl()->bump_version();
}

void track(const BatchNorm& n, const Tensor& mean, const Tensor& rstd, int64_t count) {
  if (!n.present) return;
  if (mean.scalar_type() == at::kDouble)
    track<double>(n, mean, rstd, count);
  else
    track<float>(n, mean, rstd, count);
}

// In training: input, each product's weight and bias with its norm's, and the residual.
struct Layer {
  static constexpr const char* name = "separable_conv2d_training";
  static constexpr size_t inputs = 10;
  using Options = calls::TrainOptions;

  static calls::Block block(at::TensorList t) {
    return {t[0], t[1],           optional(t[2]), optional(t[3]), optional(t[4]),
            t[5], optional(t[6]), optional(t[7]), optional(t[8])};
  }

  static EagerResults forward(at::TensorList t, const Options& options, bool) {
    const auto [out, z2, mean1, rstd1, mean2, rstd2] =
        separable_conv2d_train_forward({block(t), optional(t[9]), options});
    return {{out}, {z2, mean1, rstd1, mean2, rstd2}};
  }

  static std::array<Tensor, inputs> backward(at::TensorList t, at::TensorList saved,
                                             const variable_list& grads,
                                             const std::array<bool, inputs>& needs, const Options& o) {
    std::array<bool, 9> mask;
    std::copy_n(needs.begin(), 9, mask.begin());
    const auto found =
        separable_conv2d_train_backward({grads[0], block(t), saved[0], saved[1], saved[2], saved[3], saved[4],
                                         o.geometry, o.activations, o.has_norm1, o.has_norm2, mask});
    return std::apply([&](const auto&... g) { return std::array<Tensor, inputs>{g..., grads[0]}; }, found);
  }
};

// Training, or a forward that is recorded; the norms that are there take the batch's statistics.
std::optional<Tensor> try_separable_training(const Block& b) {
  at::DimVector sizes;
  const std::optional<bool> recorded = plain_block(b, sizes);
  if (!recorded) return std::nullopt;
  const BlockOptions& o = *b.options;
  const BatchNorm &n1 = b.norm1, &n2 = b.norm2;
  const std::array<Tensor, Layer::inputs> tensors{b.input,
                                                  b.weight1,
                                                  or_undefined(b.bias1),
                                                  or_undefined(n1.weight),
                                                  or_undefined(n1.bias),
                                                  b.weight2,
                                                  or_undefined(b.bias2),
                                                  or_undefined(n2.weight),
                                                  or_undefined(n2.bias),
                                                  o.residual ? b.input : Tensor()};
  const EagerResults r = run_eager<Layer>(
      tensors, {o.geometry, n1.eps, n2.eps, o.activations, n1.present, n2.present}, *recorded);
  const int64_t count = sizes[0] * sizes[2] * sizes[3];
  track(n1, r.saved[1], r.saved[2], count);
  track(n2, r.saved[3], r.saved[4], count);
  return r.outputs[0];
}

// As fusednn/conv/batch_norm.py's `fold`, to the bit: the product's weight and bias with its norm's, of 16 bits
// in float32: what folding loses of them a norm may magnify without bound.
std::pair<Tensor, OptionalTensor> fold(const Tensor& weight, const OptionalTensor& bias, const BatchNorm& n) {
  const auto wide = wide_dtype(weight);
  if (!n.present) return {weight.to(wide), bias ? OptionalTensor(bias->to(wide)) : bias};
  Tensor scale = (n.running_var->to(wide) + n.eps).rsqrt();
  if (n.weight) scale = scale * n.weight->to(wide);
  const Tensor mean = n.running_mean->to(wide);
  Tensor shift = (bias ? bias->to(wide) - mean : -mean) * scale;
  if (n.bias) shift = shift + n.bias->to(wide);
  return {weight.to(wide) * scale.view({-1, 1, 1, 1}), shift};
}

bool frozen_statistics(const BatchNorm& n, at::ScalarType type, int64_t channels) {
  if (!n.present) return true;
  if (!n.running_mean || !n.running_var) return false;
  const auto fits = [&](const Tensor& t) {
    return plain(t) && t.scalar_type() == type && t.sizes() == channels && !t.requires_grad();
  };
  return fits(*n.running_mean) && fits(*n.running_var);
}

// Inference; the norms that are there have frozen statistics and are folded.
std::optional<Tensor> try_separable_inference(const Block& b) {
  const Tensor &input = b.input, &weight1 = b.weight1, &weight2 = b.weight2;
  at::DimVector sizes;
  const std::optional<bool> recorded = plain_block(b, sizes);
  if (!recorded || *recorded) return std::nullopt;
  const auto type = input.scalar_type();
  if (!frozen_statistics(b.norm1, type, weight1.size(0)) || !frozen_statistics(b.norm2, type, sizes[1]))
    return std::nullopt;
  const at::AutoDispatchBelowADInplaceOrView below;
  const BlockOptions& o = *b.options;
  const SeparableCall call{depthwise_shape(input, weight1, o.geometry), sizes[1],
                           conv_format(input, {weight1, weight2}), o.activations.depthwise(),
                           o.activations.pointwise()};
  const auto [w1, b1] = fold(weight1, b.bias1, b.norm1);
  const auto [w2, b2] = fold(weight2, b.bias2, b.norm2);
  return run_separable(call, input, pack_separable(call.shape, w1, b1, w2, b2),
                       o.residual ? OptionalTensor(input) : std::nullopt);
}

}  // namespace

FUSEDNN_BINDINGS(cpu) {
  pybind11::class_<BlockOptions, std::shared_ptr<BlockOptions>>(m, "BlockOptions")
      .def(pybind11::init<int64_t, Pair, Padding, Pair, std::string, std::string, bool>());
  shortcut(m, "try_separable_training", &try_separable_training);
  shortcut(m, "try_separable_inference", &try_separable_inference);
}

}  // namespace fusednn
