// Python face of the CUDA launchers of spatial attention; schemas as in fusednn/spatial/ops.py.
//
// Device-agnostic: the tensors' device decides the guard, current_stream the stream.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "core/bindings/cuda_arguments.h"
#include "core/bindings/op.h"
#include "spatial/bindings/calls.h"
#include "spatial/cuda/params.h"

namespace fusednn {
namespace {

using at::Tensor;
using cuda::AttentionCall;
using cuda::AttentionOutput;
using cuda::AttentionShape;

AttentionOutput output_named(const char* op, const std::string& name) {
  constexpr const char* names[] = {"scale", "flatten", "sum", "coordinates"};
  for (int i = 0; i < 4; ++i) {
    if (name == names[i]) return static_cast<AttentionOutput>(i);
  }
  TORCH_CHECK_VALUE(false, op, ": output: got '", name, "', expected scale, flatten, sum or coordinates");
}

// A call's tensors, checked and dense.
class Attention : public CudaArguments {
 public:
  const AttentionCall& call() const { return call_; }
  const AttentionShape& shape() const { return call_.shape; }
  int64_t positions() const { return shape().positions(); }
  at::TensorOptions wide() const { return options().dtype(c10::promoteTypes(dtype_(), at::kFloat)); }
  Tensor empty_wide(at::IntArrayRef sizes) const { return at::empty(sizes, wide()); }

  // [..., height, width] of the maps.
  Tensor map(const char* name, const Tensor& t) const { return dense(name, t, map_size_); }
  OptionalTensor map(const char* name, const OptionalTensor& t) const { return dense(name, t, map_size_); }
  Tensor empty_map() const { return at::empty(map_size_, options()); }

 protected:
  Attention(const char* op, const char* name, const Tensor& first, at::IntArrayRef map_size)
      : CudaArguments(op, name, first), map_size_(map_size.vec()) {
    call_.dtype = dtype();
  }

  int small(const char* name, int64_t value) const {
    constexpr int64_t most = std::numeric_limits<int>::max() / 4;  // small multiples are computed in int
    TORCH_CHECK(value >= 0 && value <= most, op(), ": ", name, ": got ", value, ", expected 0 to ", most);
    return static_cast<int>(value);
  }

  void set_positions(int64_t height, int64_t width) {
    small("positions", height * width);
    call_.shape.height = static_cast<int>(height), call_.shape.width = static_cast<int>(width);
    TORCH_CHECK(height * width > 0, op(), ": features: got ", height, " x ", width,
                " positions, expected at least one");
  }

  void set_mask(const OptionalTensor& mask, at::IntArrayRef sizes) {
    if (!mask) return;
    TORCH_CHECK(mask->sizes() == sizes && mask->scalar_type() == at::kBool, op(), ": mask: got ",
                mask->scalar_type(), " of shape ", mask->sizes(), ", expected Bool of ", sizes);
    TORCH_CHECK(mask->device() == options().device(), op(), ": mask: got a tensor on ", mask->device(),
                ", expected ", options().device());
    mask_ = mask->contiguous();
    call_.mask = mask_.const_data_ptr<bool>();
  }

  void set_temperature(const calls::Temperature& given) {
    if (const OptionalTensor& learned = given.learned_temperature) {
      TORCH_CHECK(learned->numel() == 1, op(), ": temperature: got ", learned->sizes(),
                  ", expected one number");
      temperature_ = learned->to(wide()).contiguous();
      call_.learned_temperature = temperature_.const_data_ptr();
    }
    call_.temperature = given.temperature;
  }

  void set_splits() { call_.splits = cuda::attention_splits(shape(), dtype()); }

  AttentionCall call_{};

 private:
  at::ScalarType dtype_() const { return c10::typeMetaToScalarType(options().dtype()); }

  std::vector<int64_t> map_size_;
  Tensor mask_, temperature_;
};

// Every map a sample of its own, whose scores are the hidden term.
class Softmax : public Attention {
 public:
  Softmax(const char* op, const char* name, const Tensor& first, const OptionalTensor& mask,
          const calls::Temperature& temperature, AttentionOutput output)
      : Attention(op, name, first, first.sizes()) {
    TORCH_CHECK(first.dim() == 4, op, ": ", name, ": got shape ", first.sizes(), ", expected [N, G, H, W]");
    AttentionShape& s = call_.shape;
    s.batch = first.size(0) * first.size(1), s.maps = s.rows = 1;
    set_positions(first.size(2), first.size(3));
    set_mask(mask, {first.size(0), first.size(1), positions()});
    set_temperature(temperature);
    call_.output = output;
    set_splits();
  }

  void set_logits(const Tensor& dense) { call_.hidden_term = dense.const_data_ptr(); }
};

class FeatureAttention : public Attention {
 public:
  FeatureAttention(const char* op, const calls::SpatialAttentionForward& a)
      : Attention(op, "features", a.features, map_size(op, a.features, a.v ? *a.v : a.weight)) {
    const auto& [features, weight, term, v, mask, temperature, output] = a;
    AttentionShape& s = call_.shape;
    call_.output = output_named(op, output);
    s.batch = features.size(0), s.channels = small("channels", features.size(1));
    set_positions(features.size(2), features.size(3));
    s.maps = small("maps", (v ? *v : weight).size(0)), s.rows = small("rows", weight.size(0));
    TORCH_CHECK(s.channels > 0 && s.maps > 0 && s.rows > 0, op, ": weight: got shape ", weight.sizes(),
                ", expected at least one row and channel");
    small("maps times positions", s.maps * positions());
    s.additive = v.has_value();
    format_ = features.suggest_memory_format();
    s.channels_last = format_ == at::MemoryFormat::ChannelsLast;
    features_ = features.contiguous(format_);
    weight_ = dense("weight", weight, {s.rows, s.channels});
    term_ = v ? dense("hidden_term", term, {s.batch, s.rows})
              : dense("hidden_term", term, {s.batch, s.maps, positions()});
    v_ = dense("v", v, {s.maps, s.rows});
    set_mask(mask, {s.batch, positions()});
    set_temperature(temperature);
    call_.features = features_.const_data_ptr(), call_.weight = weight_.const_data_ptr();
    call_.hidden_term = data_or_null(term_), call_.v = data_or_null(v_);
    set_splits();
  }

  std::vector<int64_t> attended_size() const {
    const AttentionShape& s = shape();
    const int64_t of_maps = static_cast<int64_t>(s.maps) * s.channels;
    switch (call_.output) {
      case AttentionOutput::scale:
        return {s.batch, of_maps, s.height, s.width};
      case AttentionOutput::flatten:
        return {s.batch, of_maps * positions()};
      case AttentionOutput::sum:
        return {s.batch, of_maps};
      default:
        return {s.batch, s.maps, 2};
    }
  }

  at::MemoryFormat attended_format() const {
    return call_.output == AttentionOutput::scale ? format_ : at::MemoryFormat::Contiguous;
  }

  Tensor empty_features() const { return at::empty(features_.sizes(), options(), format_); }

 private:
  static std::vector<int64_t> map_size(const char* op, const Tensor& features, const Tensor& maps) {
    TORCH_CHECK(features.dim() == 4, op, ": features: got shape ", features.sizes(),
                ", expected [N, C, H, W]");
    TORCH_CHECK(maps.dim() == 2, op, ": weight or v: got shape ", maps.sizes(), ", expected 2 dimensions");
    return {features.size(0), maps.size(0), features.size(2), features.size(3)};
  }

  at::MemoryFormat format_;
  Tensor features_, weight_;
  OptionalTensor term_, v_;
};

// `attended` may be undefined.
void run_forward(const Attention& attention, const Tensor& attended, const Tensor& map, CUstream_st* stream) {
  const AttentionShape& s = attention.shape();
  const int splits = attention.call().splits;
  cuda::AttentionForward p{};
  p.call = attention.call();
  p.attended = attended.defined() ? attended.mutable_data_ptr() : nullptr;
  p.map = map.mutable_data_ptr();
  Tensor weights, stats, sums;
  if (splits > 1) {
    weights = attention.empty_wide({s.batch, s.maps, attention.positions()});
    stats = attention.empty_wide({s.batch, splits, s.maps, 2});
    sums = attention.empty_wide({s.batch, splits, s.maps, std::max(s.channels, 2)});
    p.weights = weights.mutable_data_ptr(), p.stats = stats.mutable_data_ptr();
    p.sums = sums.mutable_data_ptr();
  }
  attention.succeeded(cuda::attention_forward(p, stream));
}

// What the gradients of a call go to; those that are undefined are not made.
struct Gradients {
  Tensor features, weight, term, v, temperature;  // the temperature's is wide
};

void run_backward(const Attention& attention, const OptionalTensor& grad_attended,
                  const OptionalTensor& grad_map, const Tensor& map, const Gradients& grads,
                  CUstream_st* stream) {
  const AttentionShape& s = attention.shape();
  const int splits = attention.call().splits;
  const int64_t blocks = cuda::attention_backward_blocks(s, splits);
  cuda::AttentionBackward p{};
  p.call = attention.call();
  p.grad_attended = data_or_null(grad_attended), p.grad_map = data_or_null(grad_map);
  p.map = map.const_data_ptr();
  p.blocks = static_cast<int>(blocks);
  const auto made = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  p.grad_features = made(grads.features);
  const Tensor d_scores = attention.empty_wide({s.batch, s.maps, attention.positions()});
  const Tensor stats = attention.empty_wide({s.batch, splits, s.maps, 2});
  p.d_scores = d_scores.mutable_data_ptr(), p.stats = stats.mutable_data_ptr();
  Tensor d_energy, partials_of_weight, partials_of_v, partials_of_term, partials_of_temperature;
  const auto partials = [&](Tensor& t, bool wanted, at::IntArrayRef sizes) {
    if (wanted) t = attention.empty_wide(sizes);
    return made(t);
  };
  p.d_energy = partials(d_energy, s.additive, {s.batch, s.rows, attention.positions()});
  p.weight_partials =
      partials(partials_of_weight, grads.weight.defined(), {blocks * splits, s.rows, s.channels});
  p.v_partials = partials(partials_of_v, grads.v.defined(), {blocks * splits, s.maps, s.rows});
  p.term_partials = partials(partials_of_term, s.additive && grads.term.defined(), {s.batch, splits, s.rows});
  p.temperature_partials = partials(partials_of_temperature, grads.temperature.defined(), {blocks * splits});
  p.grad_term = made(grads.term);
  attention.succeeded(cuda::attention_backward(p, stream));
  const auto add = [&](const Tensor& partials, const Tensor& sums, int64_t outer, int64_t count) {
    if (!partials.defined()) return;
    const DType dtype = dtype_of(sums, attention.op());
    attention.succeeded(
        cuda::add_partials({partials.const_data_ptr(), outer, count,
                            sums.numel() / std::max<int64_t>(outer, 1), dtype, sums.mutable_data_ptr()},
                           stream));
  };
  add(partials_of_weight, grads.weight, 1, blocks * splits);
  add(partials_of_v, grads.v, 1, blocks * splits);
  add(partials_of_term, grads.term, s.batch, splits);
  add(partials_of_temperature, grads.temperature, 1, blocks * splits);
}

std::tuple<Tensor, Tensor> spatial_softmax_forward(const calls::SpatialSoftmaxForward& a) {
  const c10::DeviceGuard guard(a.logits.device());
  Softmax softmax("spatial_softmax_forward", "logits", a.logits, a.mask, a.temperature,
                  a.coordinates ? AttentionOutput::coordinates : AttentionOutput::map);
  const Tensor dense = a.logits.contiguous(), map = softmax.empty_map();
  softmax.set_logits(dense);
  Tensor xy = a.coordinates ? at::empty({a.logits.size(0), a.logits.size(1), 2}, softmax.options())
                            : at::empty({0}, softmax.options());
  run_forward(softmax, xy, map, current_stream(a.logits));
  return {map, xy};
}

// The gradient of a learned temperature in its own type and shape.
Tensor as_learned(const Tensor& grad, const OptionalTensor& learned, const Tensor& nothing) {
  return grad.defined() ? grad.to(learned->scalar_type()).reshape(learned->sizes()) : nothing;
}

std::tuple<Tensor, Tensor> spatial_softmax_backward(const calls::SpatialSoftmaxBackward& a) {
  const auto& [grad_map, grad_coordinates, mask, temperature, map, output_mask] = a;
  const c10::DeviceGuard guard(map.device());
  const Softmax softmax("spatial_softmax_backward", "map", map, mask, temperature,
                        grad_coordinates ? AttentionOutput::coordinates : AttentionOutput::map);
  const OptionalTensor grad = softmax.map("grad_map", grad_map);
  const OptionalTensor grad_xy =
      softmax.dense("grad_coordinates", grad_coordinates, {map.size(0), map.size(1), 2});
  Gradients grads;
  if (output_mask[0]) grads.term = softmax.empty_map();
  if (output_mask[1]) grads.temperature = softmax.empty_wide({1});
  if (output_mask[0] || output_mask[1])
    run_backward(softmax, grad_xy, grad, map.contiguous(), grads, current_stream(map));
  const Tensor nothing = at::empty({0}, softmax.options());
  return {output_mask[0] ? grads.term : nothing,
          as_learned(grads.temperature, temperature.learned_temperature, nothing.clone())};
}

std::tuple<Tensor, Tensor> spatial_attention_forward(const calls::SpatialAttentionForward& a) {
  const c10::DeviceGuard guard(a.features.device());
  const FeatureAttention attention("spatial_attention_forward", a);
  const Tensor attended =
      at::empty(attention.attended_size(), attention.options(), attention.attended_format());
  const Tensor map = attention.empty_map();
  run_forward(attention, attended, map, current_stream(a.features));
  return {attended, map};
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors spatial_attention_backward(const calls::SpatialAttentionBackward& a) {
  const auto& [grad_attended, grad_map, forward, map, output_mask] = a;
  const Tensor &features = forward.features, &weight = forward.weight;
  const c10::DeviceGuard guard(features.device());
  const FeatureAttention attention("spatial_attention_backward", forward);
  const OptionalTensor grad =
      attention.dense("grad_attended", grad_attended, attention.attended_size(), attention.attended_format());
  const OptionalTensor grad_of_map = attention.map("grad_map", grad_map);
  const auto empty = [&](bool wanted, at::IntArrayRef sizes) {
    return wanted ? at::empty(sizes, attention.options()) : Tensor();
  };
  Gradients grads;
  if (output_mask[0]) grads.features = attention.empty_features();
  grads.weight = empty(output_mask[1], weight.sizes());
  if (output_mask[2]) grads.term = empty(true, forward.hidden_term->sizes());
  if (output_mask[3]) grads.v = empty(true, forward.v->sizes());
  if (output_mask[4]) grads.temperature = attention.empty_wide({1});
  run_backward(attention, grad, grad_of_map, attention.map("map", map), grads, current_stream(features));
  const auto given = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, attention.options()); };
  return {given(grads.features), given(grads.weight), given(grads.term), given(grads.v),
          as_learned(grads.temperature, forward.temperature.learned_temperature, given({}))};
}

}  // namespace

FUSEDNN_BINDINGS(cuda) {
  op(m, "spatial_softmax_forward", &spatial_softmax_forward);
  op(m, "spatial_softmax_backward", &spatial_softmax_backward);
  op(m, "spatial_attention_forward", &spatial_attention_forward);
  op(m, "spatial_attention_backward", &spatial_attention_backward);
}

}  // namespace fusednn
