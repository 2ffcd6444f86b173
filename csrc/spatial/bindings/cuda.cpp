// Python face of the CUDA launchers of spatial attention; schemas as in fusednn/spatial/ops.py.
//
// Device-agnostic: the tensors' device decides the guard, current_stream the stream.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <tuple>

#include "core/bindings/cuda_arguments.h"
#include "core/bindings/op.h"
#include "spatial/bindings/checked.h"
#include "spatial/cuda/params.h"

namespace fusednn {
namespace {

using at::Tensor;
using cuda::AttentionCall;
using cuda::AttentionOutput;
using cuda::AttentionShape;

AttentionOutput output_named(const std::string& name) {
  if (name == "scale") return AttentionOutput::scale;
  if (name == "flatten") return AttentionOutput::flatten;
  return name == "sum" ? AttentionOutput::sum : AttentionOutput::coordinates;
}

// What kernels take of a call.
struct Arguments {
  AttentionCall call{};
  Tensor learned_temperature;

  void set_shape(const CheckedArguments& c, const AttentionShape& shape, const OptionalTensor& mask,
                 const calls::Temperature& temperature) {
    c.small("positions", int64_t{shape.height} * shape.width);
    call.shape = shape;
    call.dtype = c.dtype();
    call.mask = mask ? mask->const_data_ptr<bool>() : nullptr;
    call.temperature = temperature.temperature;
    if (const OptionalTensor& learned = temperature.learned_temperature) {
      learned_temperature = learned->to(c.wide()).contiguous();
      call.learned_temperature = learned_temperature.const_data_ptr();
    }
    call.splits = cuda::attention_splits(shape, c.dtype());
  }
};

struct Softmax : CheckedSoftmax, Arguments {
  Softmax(const char* op, const char* name, const Tensor& t, const OptionalTensor& given_mask,
          const calls::Temperature& temperature, bool coordinates)
      : CheckedSoftmax(op, name, t, given_mask, temperature) {
    AttentionShape s{};
    s.batch = t.size(0) * t.size(1), s.maps = s.rows = 1;
    s.height = small("height", t.size(2)), s.width = small("width", t.size(3));
    set_shape(*this, s, mask, temperature);
    call.output = coordinates ? AttentionOutput::coordinates : AttentionOutput::map;
  }
};

struct FeatureAttention : CheckedSpatialAttention, Arguments {
  Tensor features;
  OptionalTensor term;

  FeatureAttention(const char* op, const calls::SpatialAttentionForward& a) : CheckedSpatialAttention(op, a) {
    AttentionShape s{};
    s.batch = batch, s.channels = small("channels", channels);
    s.height = small("height", height), s.width = small("width", width);
    s.maps = small("maps", glimpses), s.rows = small("rows", rows);
    TORCH_CHECK(channels > 0 && glimpses > 0 && rows > 0, op, ": weight: got shape ", weight.sizes(),
                ", expected at least one row and channel");
    small("maps times positions", glimpses * positions());
    s.additive = v.has_value(), s.channels_last = format == at::MemoryFormat::ChannelsLast;
    set_shape(*this, s, mask, a.temperature);
    call.output = output_named(a.output);
    features = a.features.contiguous(format), term = fusednn::dense(a.hidden_term);
    call.features = features.const_data_ptr(), call.weight = weight.const_data_ptr();
    call.hidden_term = data_or_null(term), call.v = data_or_null(v);
  }

  at::MemoryFormat attended_format() const { return of_images ? format : at::MemoryFormat::Contiguous; }
};

Tensor empty_wide(const CheckedArguments& call, at::IntArrayRef sizes) {
  return at::empty(sizes, call.wide_options());
}

// `attended` may be undefined.
template <class Attention>
void run_forward(const Attention& attention, const Tensor& attended, const Tensor& map) {
  const AttentionShape& s = attention.call.shape;
  const int splits = attention.call.splits;
  cuda::AttentionForward p{};
  p.call = attention.call;
  p.attended = attended.defined() ? attended.mutable_data_ptr() : nullptr;
  p.map = map.mutable_data_ptr();
  Tensor weights, stats, sums;
  if (splits > 1) {
    weights = empty_wide(attention, {s.batch, s.maps, s.positions()});
    stats = empty_wide(attention, {s.batch, splits, s.maps, 2});
    sums = empty_wide(attention, {s.batch, splits, s.maps, std::max(s.channels, 2)});
    p.weights = weights.mutable_data_ptr(), p.stats = stats.mutable_data_ptr();
    p.sums = sums.mutable_data_ptr();
  }
  launched(attention, cuda::attention_forward(p, current_stream(map)));
}

// What the gradients of a call go to; those that are undefined are not made.
struct Gradients {
  Tensor features, weight, term, v, temperature;  // the temperature's is wide
};

template <class Attention>
void run_backward(const Attention& attention, const OptionalTensor& grad_attended,
                  const OptionalTensor& grad_map, const Tensor& map, const Gradients& grads) {
  const AttentionShape& s = attention.call.shape;
  const int splits = attention.call.splits;
  CUstream_st* stream = current_stream(map);
  const int64_t blocks = cuda::attention_backward_blocks(s, splits);
  cuda::AttentionBackward p{};
  p.call = attention.call;
  p.grad_attended = data_or_null(grad_attended), p.grad_map = data_or_null(grad_map);
  p.map = map.const_data_ptr();
  p.blocks = static_cast<int>(blocks);
  const auto made = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
  p.grad_features = made(grads.features);
  const Tensor d_scores = empty_wide(attention, {s.batch, s.maps, s.positions()});
  const Tensor stats = empty_wide(attention, {s.batch, splits, s.maps, 2});
  p.d_scores = d_scores.mutable_data_ptr(), p.stats = stats.mutable_data_ptr();
  Tensor d_energy, partials_of_weight, partials_of_v, partials_of_term, partials_of_temperature;
  const auto partials = [&](Tensor& t, bool wanted, at::IntArrayRef sizes) {
    if (wanted) t = empty_wide(attention, sizes);
    return made(t);
  };
  p.d_energy = partials(d_energy, s.additive, {s.batch, s.rows, s.positions()});
  p.weight_partials =
      partials(partials_of_weight, grads.weight.defined(), {blocks * splits, s.rows, s.channels});
  p.v_partials = partials(partials_of_v, grads.v.defined(), {blocks * splits, s.maps, s.rows});
  p.term_partials = partials(partials_of_term, s.additive && grads.term.defined(), {s.batch, splits, s.rows});
  p.temperature_partials = partials(partials_of_temperature, grads.temperature.defined(), {blocks * splits});
  p.grad_term = made(grads.term);
  launched(attention, cuda::attention_backward(p, stream));
  const auto add = [&](const Tensor& partials, const Tensor& sums, int64_t outer, int64_t count) {
    if (!partials.defined()) return;
    const DType dtype = dtype_of(sums, attention.op());
    launched(attention,
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
  const Tensor& logits = a.logits;
  const c10::DeviceGuard guard(logits.device());
  Softmax softmax("spatial_softmax_forward", "logits", logits, a.mask, a.temperature, a.coordinates);
  const Tensor dense = logits.contiguous(), map = at::empty(logits.sizes(), logits.options());
  softmax.call.hidden_term = dense.const_data_ptr();
  const Tensor xy = a.coordinates ? at::empty({logits.size(0), logits.size(1), 2}, logits.options())
                                  : at::empty({0}, logits.options());
  run_forward(softmax, xy, map);
  return {map, xy};
}

std::tuple<Tensor, Tensor> spatial_softmax_backward(const calls::SpatialSoftmaxBackward& a) {
  const auto& [grad_map, grad_coordinates, mask, temperature, map, output_mask] = a;
  const c10::DeviceGuard guard(map.device());
  const Softmax softmax("spatial_softmax_backward", "map", map, mask, temperature,
                        grad_coordinates.has_value());
  check_wanted(softmax.op(), output_mask, {true, temperature.learned_temperature.has_value()});
  const OptionalTensor grad = softmax.dense("grad_map", grad_map, map.sizes());
  const OptionalTensor grad_xy =
      softmax.dense("grad_coordinates", grad_coordinates, {map.size(0), map.size(1), 2});
  Gradients grads;
  if (output_mask[0]) grads.term = at::empty(map.sizes(), map.options());
  if (output_mask[1]) grads.temperature = empty_wide(softmax, {1});
  if (output_mask[0] || output_mask[1]) run_backward(softmax, grad_xy, grad, map.contiguous(), grads);
  return {or_empty(output_mask[0], grads.term, map),
          temperature_gradient(grads.temperature, output_mask[1], temperature, softmax)};
}

std::tuple<Tensor, Tensor> spatial_attention_forward(const calls::SpatialAttentionForward& a) {
  const c10::DeviceGuard guard(a.features.device());
  const FeatureAttention attention("spatial_attention_forward", a);
  const Tensor attended =
      at::empty(attention.attended_sizes(), attention.options(), attention.attended_format());
  const Tensor map = at::empty(attention.map_sizes(), attention.options());
  run_forward(attention, attended, map);
  return {attended, map};
}

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FiveTensors spatial_attention_backward(const calls::SpatialAttentionBackward& a) {
  const auto& [grad_attended, grad_map, forward, map, output_mask] = a;
  const auto& [features, weight, hidden_term, v, mask, temperature, output] = forward;
  const c10::DeviceGuard guard(features.device());
  const FeatureAttention attention("spatial_attention_backward", forward);
  check_wanted(
      attention.op(), output_mask,
      {true, true, hidden_term.has_value(), v.has_value(), temperature.learned_temperature.has_value()});
  const OptionalTensor grad = attention.dense("grad_attended", grad_attended, attention.attended_sizes(),
                                              attention.attended_format());
  const OptionalTensor grad_of_map = attention.dense("grad_map", grad_map, attention.map_sizes());
  const Tensor dense_map = attention.dense("map", map, attention.map_sizes());
  Gradients grads;
  if (output_mask[0]) grads.features = at::empty(features.sizes(), attention.options(), attention.format);
  if (output_mask[1]) grads.weight = at::empty(weight.sizes(), attention.options());
  if (output_mask[2]) grads.term = at::empty(hidden_term->sizes(), attention.options());
  if (output_mask[3]) grads.v = at::empty(v->sizes(), attention.options());
  if (output_mask[4]) grads.temperature = empty_wide(attention, {1});
  run_backward(attention, grad, grad_of_map, dense_map, grads);
  return {or_empty(output_mask[0], grads.features, map), or_empty(output_mask[1], grads.weight, map),
          or_empty(output_mask[2], grads.term, map), or_empty(output_mask[3], grads.v, map),
          temperature_gradient(grads.temperature, output_mask[4], temperature, attention)};
}

}  // namespace

FUSEDNN_BINDINGS(cuda) {
  op(m, "spatial_softmax_forward", &spatial_softmax_forward);
  op(m, "spatial_softmax_backward", &spatial_softmax_backward);
  op(m, "spatial_attention_forward", &spatial_attention_forward);
  op(m, "spatial_attention_backward", &spatial_attention_backward);
}

}  // namespace fusednn
