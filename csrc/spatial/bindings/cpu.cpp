// fusednn._C.cpu: spatial attention and the softmax over positions on CPU tensors.
#include "spatial/bindings/cpu.h"

#include <ATen/ops/scalar_tensor.h>

#include <cmath>

#include "core/bindings/cpu_kernel.h"
#include "core/bindings/op.h"
#include "spatial/bindings/checked.h"
#include "spatial/cpu/params.h"

namespace fusednn {

using at::MemoryFormat;
using at::Tensor;
using cpu::SpatialOutput;

namespace {

// T for the kernels, which hold it to the smallest normal number: NaN unless it is positive.
double temperature_of(const calls::Temperature& given) {
  const OptionalTensor& learned = given.learned_temperature;
  if (!learned) return given.temperature;
  const double t = learned->item().toDouble();
  return t > 0 ? t : std::nan("");
}

void run_forward(const cpu::SpatialForward& p) {
  const auto& kernels = cpu::kernels<cpu::SpatialKernels>();
  if (p.shape.batch > 0) run_kernel(kernels.forward_workspace, kernels.forward, p);
}

void run_backward(const cpu::SpatialBackward& p) {
  const auto& kernels = cpu::kernels<cpu::SpatialKernels>();
  if (p.forward.shape.batch > 0) run_kernel(kernels.backward_workspace, kernels.backward, p);
}

const bool* bools(const OptionalTensor& mask) { return mask ? mask->const_data_ptr<bool>() : nullptr; }

// A call's tensors, checked and dense in the layout that its kernel takes. Additive scores and a flat result
// are made from planes.
struct AttentionCall : CheckedSpatialAttention {
  cpu::SpatialShape shape;
  MemoryFormat layout;  // of the copy that the kernel reads
  double temperature;
  Tensor features;
  OptionalTensor hidden_term;

  AttentionCall(const char* op, const calls::SpatialAttentionForward& a, bool backward = false)
      : CheckedSpatialAttention(op, a) {
    check_on_cpu(*this);
    temperature = temperature_of(a.temperature);
    layout = flat || v ? MemoryFormat::Contiguous : format;
    SpatialOutput output = SpatialOutput::coordinates;
    if (of_images || flat) output = SpatialOutput::scale;
    if (a.output == "sum") output = SpatialOutput::sum;
    shape = {batch,    channels, height,        width,
             glimpses, rows,     v.has_value(), layout == MemoryFormat::ChannelsLast,
             output};
    features = a.features.contiguous(layout);
    hidden_term = backward && !v ? a.hidden_term : fusednn::dense(a.hidden_term);  // looked at, not read
  }

  cpu::SpatialForward arguments(void* attended, const Tensor& map) const {
    return {dtype(),
            shape,
            temperature,
            features.const_data_ptr(),
            weight.const_data_ptr(),
            data_or_null(hidden_term),
            data_or_null(v),
            bools(mask),
            attended,
            const_cast<void*>(map.const_data_ptr()),
            nullptr};
  }
};

}  // namespace

std::tuple<Tensor, Tensor> spatial_attention_forward(const calls::SpatialAttentionForward& a) {
  const AttentionCall call("spatial_attention_forward", a);
  const auto layout = call.of_images ? call.layout : MemoryFormat::Contiguous;
  const Tensor attended = at::empty(call.attended_sizes(), a.features.options(), layout);
  const Tensor map = at::empty(call.map_sizes(), a.features.options());
  run_forward(call.arguments(mutable_data_or_null(attended), map));
  return {call.of_images ? attended.contiguous(call.format) : attended, map};
}

SpatialGradients spatial_attention_backward(const calls::SpatialAttentionBackward& a) {
  const auto& [grad_attended, grad_map, forward, map, output_mask] = a;
  const auto& [features, weight, hidden_term, v, mask, temperature, output] = forward;
  const AttentionCall call("spatial_attention_backward", forward, true);
  const Tensor dense_map = call.dense("map", map, call.map_sizes());
  const OptionalTensor of_map = call.dense("grad_map", grad_map, call.map_sizes());
  const auto layout = call.of_images ? call.layout : MemoryFormat::Contiguous;
  const OptionalTensor grad = call.dense("grad_attended", grad_attended, call.attended_sizes(), layout);
  check_wanted(
      call.op(), output_mask,
      {true, true, hidden_term.has_value(), v.has_value(), temperature.learned_temperature.has_value()});

  const auto options = features.options();
  const auto room = [&](bool wanted, at::IntArrayRef sizes, MemoryFormat format = MemoryFormat::Contiguous) {
    return wanted ? at::empty(sizes, options, format) : at::empty({0}, options);
  };
  const Tensor grad_features = room(output_mask[0], features.sizes(), call.layout);
  const Tensor grad_weight = room(output_mask[1], weight.sizes());
  const Tensor grad_term = room(output_mask[2], hidden_term ? hidden_term->sizes() : at::IntArrayRef());
  const Tensor grad_v = room(output_mask[3], v ? v->sizes() : at::IntArrayRef());
  double grad_temperature = 0;
  if (call.shape.batch > 0) {
    run_backward({call.arguments(nullptr, dense_map), data_or_null(grad), data_or_null(of_map),
                  mutable_data_or_null(grad_features), mutable_data_or_null(grad_weight),
                  mutable_data_or_null(grad_term), mutable_data_or_null(grad_v),
                  output_mask[4] ? &grad_temperature : nullptr, nullptr});
  } else {
    grad_weight.zero_();
    grad_v.zero_();
  }
  return {output_mask[0] ? grad_features.contiguous(call.format) : grad_features, grad_weight, grad_term,
          grad_v,
          temperature_gradient(at::scalar_tensor(grad_temperature, at::kDouble), output_mask[4], temperature,
                               call)};
}

namespace {

// The kernels' arguments but for those that the direction decides.
struct SoftmaxCall : CheckedSoftmax {
  cpu::SpatialForward arguments{};

  SoftmaxCall(const char* op, const char* name, const Tensor& t, const OptionalTensor& given_mask,
              const calls::Temperature& temperature, bool coordinates)
      : CheckedSoftmax(op, name, t, given_mask, temperature) {
    check_on_cpu(*this);
    const auto output = coordinates ? SpatialOutput::coordinates : SpatialOutput::scale;
    arguments.dtype = dtype();
    arguments.shape = {t.size(0) * t.size(1), 0, t.size(2), t.size(3), 1, 1, false, false, output};
    arguments.temperature = temperature_of(temperature);
    arguments.mask = bools(mask);
  }
};

std::tuple<Tensor, Tensor> spatial_softmax_forward(const calls::SpatialSoftmaxForward& a) {
  const auto& [logits, mask, temperature, coordinates] = a;
  SoftmaxCall call("spatial_softmax_forward", "logits", logits, mask, temperature, coordinates);
  const Tensor dense_logits = logits.contiguous();
  const Tensor map = at::empty(logits.sizes(), logits.options());
  const Tensor xy = coordinates ? at::empty({logits.size(0), logits.size(1), 2}, logits.options())
                                : at::empty({0}, logits.options());
  call.arguments.hidden_term = dense_logits.const_data_ptr();
  call.arguments.attended = mutable_data_or_null(xy);
  call.arguments.map = map.mutable_data_ptr();
  run_forward(call.arguments);
  return {map, xy};
}

std::tuple<Tensor, Tensor> spatial_softmax_backward(const calls::SpatialSoftmaxBackward& a) {
  const auto& [grad_map, grad_coordinates, mask, temperature, map, output_mask] = a;
  const SoftmaxCall call("spatial_softmax_backward", "map", map, mask, temperature,
                         grad_coordinates.has_value());
  check_wanted(call.op(), output_mask, {true, temperature.learned_temperature.has_value()});
  const OptionalTensor of_map = call.dense("grad_map", grad_map, map.sizes()),
                       of_xy =
                           call.dense("grad_coordinates", grad_coordinates, {map.size(0), map.size(1), 2});
  const Tensor dense_map = map.contiguous();
  const Tensor grad = output_mask[0] ? at::empty(map.sizes(), map.options()) : at::empty({0}, map.options());
  double grad_temperature = 0;
  cpu::SpatialBackward p{};
  p.forward = call.arguments;
  p.forward.map = const_cast<void*>(dense_map.const_data_ptr());
  p.grad_attended = data_or_null(of_xy), p.grad_map = data_or_null(of_map);
  p.grad_term = mutable_data_or_null(grad);
  p.grad_temperature = output_mask[1] ? &grad_temperature : nullptr;
  run_backward(p);
  return {grad, temperature_gradient(at::scalar_tensor(grad_temperature, at::kDouble), output_mask[1],
                                     temperature, call)};
}

}  // namespace

FUSEDNN_BINDINGS(cpu) {
  op(m, "spatial_softmax_forward", &spatial_softmax_forward);
  op(m, "spatial_softmax_backward", &spatial_softmax_backward);
  op(m, "spatial_attention_forward", &spatial_attention_forward);
  op(m, "spatial_attention_backward", &spatial_attention_backward);
}

}  // namespace fusednn
