// The eager shortcut of the depthwise-separable block on CPU tensors, as docs/design/006-eager-shortcut.md
// has it: one call into the extension for the forward, the running statistics and the autograd node. Nothing
// is returned where any condition fails; the caller then takes the general way, which also words the errors.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/custom_class.h>

#include "conv/bindings/cpu.h"
#include "core/bindings/bindings.h"
#include "core/bindings/eager_call.h"
#include "core/bindings/weight_cache.h"
#include "core/cpu/features.h"

namespace fusednn {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What a block is, beside its tensors.
struct BlockOptions : torch::CustomClassHolder {
  int64_t in_channels;
  Pair stride;
  Padding padding;
  Pair dilation;
  std::string activation1, activation2;
  bool residual;

  BlockOptions(int64_t c, const Pair& s, const Padding& p, const Pair& d, std::string a1, std::string a2,
               bool r)
      : in_channels(c),
        stride(s),
        padding(p),
        dilation(d),
        activation1(std::move(a1)),
        activation2(std::move(a2)),
        residual(r) {}
};

using Options = c10::intrusive_ptr<BlockOptions>;

// A BatchNorm2d that takes its statistics from the batch; buffers are left out where it doesn't track them.
struct BatchNorm {
  bool present = false;
  OptionalTensor weight, bias, running_mean, running_var, num_batches_tracked;
  std::optional<double> momentum;
  double eps = 0;

  using Fields = std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
                            std::optional<double>, double>;
  explicit BatchNorm(const std::optional<Fields>& fields) : present(fields.has_value()) {
    if (present)
      std::tie(weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps) = *fields;
  }
};

struct Block {
  Options options;
  Tensor input, weight1;
  OptionalTensor bias1;
  BatchNorm norm1;
  Tensor weight2;
  OptionalTensor bias2;
  BatchNorm norm2;
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
  const auto size = [&](int i) {
    return out_size(input.size(2 + i), o.padding[2 * i] + o.padding[2 * i + 1], weight1.size(2 + i),
                    o.stride[i], o.dilation[i]);
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

// Whether this is a plain call of consistent shapes; `record` says if it is to be recorded.
bool plain_block(const Block& b, at::DimVector& sizes, bool& record) {
  if (!nobody_listens() || !plain(b.input) || !supported(b.input.scalar_type())) return false;
  sizes = result_sizes(*b.options, b.input, b.weight1, b.weight2);
  if (sizes.empty()) return false;
  const int64_t channels = b.weight1.size(0);
  PlainCall call{b.input.scalar_type()};
  call(b.input, b.input.sizes());
  look_at(call, b.weight1, {channels, 1, b.weight1.size(2), b.weight1.size(3)}, b.bias1, b.norm1);
  look_at(call, b.weight2, {sizes[1], channels, 1, 1}, b.bias2, b.norm2);
  if (!call.ok || !can_track(b.norm1, b.input, channels) || !can_track(b.norm2, b.input, sizes[1]))
    return false;
  if ((b.norm1.present || b.norm2.present) && sizes[0] * sizes[2] * sizes[3] == 1) return false;
  record = call.requires_grad && at::GradMode::is_enabled();
  return !(record && below_autograd());
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

BlockForward run_forward(const Block& b, const OptionalTensor& residual) {
  const BlockOptions& o = *b.options;
  return separable_conv2d_train_forward(b.input, b.weight1, b.bias1, b.norm1.weight, b.norm1.bias, b.weight2,
                                        b.bias2, b.norm2.weight, b.norm2.bias, residual, o.stride, o.padding,
                                        o.dilation, b.norm1.eps, b.norm2.eps, o.activation1, o.activation2,
                                        b.norm1.present, b.norm2.present);
}

// Kept from a recorded forward for its backward, beside tensors.
struct BlockCall : torch::CustomClassHolder {
  Options options;
  double eps1, eps2;
  bool norm1, norm2;
  explicit BlockCall(const Block& b)
      : options(b.options),
        eps1(b.norm1.eps),
        eps2(b.norm2.eps),
        norm1(b.norm1.present),
        norm2(b.norm2.present) {}
};

constexpr int kFoldedVariants = 128;  // of packings, beside those of separable_conv2d_forward
constexpr int kTensors = 9;           // input, then each product's weight and bias with its norm's

// The backward as the reference writes it, in torch ops that can be differentiated again.
variable_list differentiable_backward(const BlockCall& call, const variable_list& saved, const Tensor& grad,
                                      const std::array<bool, kTensors>& needs) {
  const pybind11::gil_scoped_acquire gil;
  pybind11::list tensors;
  for (int i = 0; i < kTensors; ++i)
    tensors.append(saved[i].defined() ? pybind11::cast(saved[i]) : pybind11::object(pybind11::none()));
  const BlockOptions& o = *call.options;
  const auto options = pybind11::make_tuple(o.stride, o.padding, o.dilation, call.eps1, call.eps2,
                                            o.activation1, o.activation2, call.norm1, call.norm2);
  const auto ops = pybind11::module_::import("fusednn.conv.ops");
  variable_list result;
  for (const auto& g : ops.attr("separable_gradients")(tensors, grad, needs, options))
    result.push_back(g.is_none() ? Tensor() : g.cast<Tensor>());
  return result;
}

struct SeparableBlock : torch::autograd::Function<SeparableBlock> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight1,
                        const OptionalTensor& bias1, const OptionalTensor& norm1_weight,
                        const OptionalTensor& norm1_bias, const Tensor& weight2, const OptionalTensor& bias2,
                        const OptionalTensor& norm2_weight, const OptionalTensor& norm2_bias,
                        const OptionalTensor& residual, const Block& block, BlockForward* results) {
    const at::AutoDispatchBelowADInplaceOrView below;
    *results = run_forward(block, residual);
    const auto& [out, z2, mean1, rstd1, mean2, rstd2] = *results;
    ctx->save_for_backward({input, weight1, or_undefined(bias1), or_undefined(norm1_weight),
                            or_undefined(norm1_bias), weight2, or_undefined(bias2),
                            or_undefined(norm2_weight), or_undefined(norm2_bias), z2, mean1, rstd1, mean2,
                            rstd2});
    ctx->saved_data["call"] = c10::IValue::make_capsule(c10::make_intrusive<BlockCall>(block));
    ctx->set_materialize_grads(false);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(kTensors + 3);
    if (!grads[0].defined()) return result;
    const auto call = c10::static_intrusive_pointer_cast<BlockCall>(ctx->saved_data["call"].toCapsule());
    const variable_list s = ctx->get_saved_variables();
    std::array<bool, kTensors> needs;
    int edge = 0;  // arguments that are left out have none
    for (int i = 0; i < kTensors; ++i) needs[i] = s[i].defined() && ctx->needs_input_grad(edge++);
    if (call->options->residual && ctx->needs_input_grad(edge)) result[kTensors] = grads[0];
    if (watched(grads)) {
      const variable_list found = differentiable_backward(*call, s, grads[0], needs);
      std::copy(found.begin(), found.end(), result.begin());
      return result;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    const BlockOptions& o = *call->options;
    const auto found = separable_conv2d_train_backward(
        grads[0], s[0], s[1], optional(s[2]), optional(s[3]), optional(s[4]), s[5], optional(s[6]),
        optional(s[7]), optional(s[8]), s[9], s[10], s[11], s[12], s[13], o.stride, o.padding, o.dilation,
        o.activation1, o.activation2, call->norm1, call->norm2, needs);
    const auto keep = [&](int i, const Tensor& t) {
      if (needs[i]) result[i] = t;
    };
    std::apply(
        [&](const auto&... t) {
          int i = 0;
          (keep(i++, t), ...);
        },
        found);
    return result;
  }
};

// Training, or a forward that is recorded; the norms that are there take the batch's statistics.
std::optional<Tensor> try_separable_training(const Options& options, const Tensor& input,
                                             const Tensor& weight1, const OptionalTensor& bias1,
                                             const std::optional<BatchNorm::Fields>& norm1,
                                             const Tensor& weight2, const OptionalTensor& bias2,
                                             const std::optional<BatchNorm::Fields>& norm2) {
  const Block block{options, input, weight1, bias1, BatchNorm(norm1), weight2, bias2, BatchNorm(norm2)};
  at::DimVector sizes;
  bool record = false;
  if (!plain_block(block, sizes, record)) return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  const OptionalTensor residual = options->residual ? OptionalTensor(input) : std::nullopt;
  BlockForward results;
  Tensor out;
  if (record) {
    out = SeparableBlock::apply(input, weight1, bias1, block.norm1.weight, block.norm1.bias, weight2, bias2,
                                block.norm2.weight, block.norm2.bias, residual, block, &results);
  } else {
    const at::AutoDispatchBelowADInplaceOrView below;
    results = run_forward(block, residual);
    out = std::get<0>(results);
  }
  const int64_t count = sizes[0] * sizes[2] * sizes[3];
  track(block.norm1, std::get<2>(results), std::get<3>(results), count);
  track(block.norm2, std::get<4>(results), std::get<5>(results), count);
  return out;
}

// As fusednn/conv/batch_norm.py's `fold`, to the bit: the product's weight and bias with its norm's.
std::pair<Tensor, OptionalTensor> fold(const Tensor& weight, const OptionalTensor& bias, const BatchNorm& n) {
  if (!n.present) return {weight, bias};
  const auto type = weight.scalar_type(), wide = type == at::kDouble ? at::kDouble : at::kFloat;
  Tensor scale = (n.running_var->to(wide) + n.eps).rsqrt();
  if (n.weight) scale = scale * n.weight->to(wide);
  const Tensor mean = n.running_mean->to(wide);
  Tensor shift = (bias ? bias->to(wide) - mean : -mean) * scale;
  if (n.bias) shift = shift + n.bias->to(wide);
  return {(weight.to(wide) * scale.view({-1, 1, 1, 1})).to(type), shift.to(type)};
}

// Everything that the folded weights are made from, and which of it is there.
std::vector<Tensor> fold_sources(const Block& b, int& present) {
  std::vector<Tensor> sources{b.weight1, b.weight2};
  present = 0;
  for (const OptionalTensor* t :
       {&b.bias1, &b.bias2, &b.norm1.weight, &b.norm1.bias, &b.norm1.running_mean, &b.norm1.running_var,
        &b.norm2.weight, &b.norm2.bias, &b.norm2.running_mean, &b.norm2.running_var}) {
    present = 2 * present + (t->has_value() ? 1 : 0);
    if (*t) sources.push_back(**t);
  }
  return sources;
}

bool frozen_statistics(const BatchNorm& n, at::ScalarType type, int64_t channels) {
  if (!n.present) return true;
  if (!n.running_mean || !n.running_var) return false;
  PlainCall call{type};
  for (const OptionalTensor* t : {&n.running_mean, &n.running_var}) call(**t, channels);
  return call.ok && !call.requires_grad;
}

// Inference; the norms that are there have frozen statistics and are folded, at most once for the same
// sources.
std::optional<Tensor> try_separable_inference(const Options& options, const Tensor& input,
                                              const Tensor& weight1, const OptionalTensor& bias1,
                                              const std::optional<BatchNorm::Fields>& norm1,
                                              const Tensor& weight2, const OptionalTensor& bias2,
                                              const std::optional<BatchNorm::Fields>& norm2) {
  const Block b{options, input, weight1, bias1, BatchNorm(norm1), weight2, bias2, BatchNorm(norm2)};
  at::DimVector sizes;
  bool record = false;
  if (!plain_block(b, sizes, record) || record) return std::nullopt;
  const auto type = input.scalar_type();
  if (!frozen_statistics(b.norm1, type, weight1.size(0)) || !frozen_statistics(b.norm2, type, sizes[1]))
    return std::nullopt;
  int present = 0;
  const std::vector<Tensor> sources = fold_sources(b, present);
  WeightCache& cache = WeightCache::instance();
  if (!cache.may_keep(sources)) return std::nullopt;

  const pybind11::gil_scoped_release unlocked;
  const at::AutoDispatchBelowADInplaceOrView below;
  const BlockOptions& o = *options;
  const SeparableCall call{depthwise_shape(input, weight1, o.stride, o.padding, o.dilation), sizes[1],
                           conv_format(input, {weight1, weight2}),
                           activation_named(o.activation1, "depthwise_activation"),
                           activation_named(o.activation2, "pointwise_activation")};
  const auto pack = [&] {
    const auto [w1, b1] = fold(weight1, bias1, b.norm1);
    const auto [w2, b2] = fold(weight2, bias2, b.norm2);
    return pack_separable(call.shape, w1, b1, w2, b2);
  };
  const int variant = kFoldedVariants + static_cast<int>(cpu::current_isa()) + 4 * present;
  const Tensor kept = cache.find(sources, variant, pack, {b.norm1.eps, b.norm2.eps});
  return run_separable(call, input, kept.defined() ? kept : pack(),
                       o.residual ? OptionalTensor(input) : std::nullopt);
}

}  // namespace

void bind_conv_cpu_eager(pybind11::module_& m) {
  pybind11::class_<BlockOptions, Options>(m, "BlockOptions")
      .def(pybind11::init([](int64_t in_channels, const Pair& stride, const Padding& padding,
                             const Pair& dilation, const std::string& activation1,
                             const std::string& activation2, bool residual) {
        return c10::make_intrusive<BlockOptions>(in_channels, stride, padding, dilation, activation1,
                                                 activation2, residual);
      }));
  m.def("try_separable_training", &try_separable_training);
  m.def("try_separable_inference", &try_separable_inference);
}

}  // namespace fusednn
