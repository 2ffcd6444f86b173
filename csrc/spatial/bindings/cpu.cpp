// fusednn._C.cpu: spatial attention and the softmax over positions on CPU tensors.
#include "spatial/bindings/cpu.h"

#include <ATen/ops/full.h>

#include <cmath>

#include "core/bindings/cpu_kernel.h"
#include "core/bindings/op.h"
#include "spatial/cpu/params.h"

namespace fusednn {

using at::MemoryFormat;
using at::Tensor;
using cpu::SpatialOutput;

namespace {

SpatialOutput output_named(const std::string& name) {
  if (name == "scale" || name == "flatten") return SpatialOutput::scale;
  if (name == "sum") return SpatialOutput::sum;
  TORCH_CHECK_VALUE(name == "coordinates", "output: got '", name,
                    "', expected 'scale', 'flatten', 'sum' or 'coordinates'");
  return SpatialOutput::coordinates;
}

// T for the kernels, which hold it to the smallest normal number: NaN unless it is positive.
double temperature_of(const calls::Temperature& given) {
  const OptionalTensor& learned = given.learned_temperature;
  if (!learned) return given.temperature;
  TORCH_CHECK(learned->numel() == 1 && learned->device().is_cpu(), "temperature: got shape ",
              learned->sizes(), " on ", learned->device(), ", expected one number on cpu");
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

Tensor temperature_gradient(double found, bool wanted, const calls::Temperature& t, const Tensor& like) {
  if (!wanted) return at::empty({0}, like.options());
  return at::full(t.learned_temperature->sizes(), found, t.learned_temperature->options());
}

const bool* bools(const OptionalTensor& mask) { return mask ? mask->const_data_ptr<bool>() : nullptr; }

// A call's tensors, checked and dense in the layout that its kernel takes. Additive scores and a flat result
// are made from planes.
struct AttentionCall {
  cpu::SpatialShape shape;
  DType dtype;
  MemoryFormat format, layout;  // of the features, and of the copy that the kernel reads
  bool flat;
  double temperature;
  Tensor features, weight;
  OptionalTensor hidden_term, v, mask;

  explicit AttentionCall(const calls::SpatialAttentionForward& a, bool backward = false)
      : dtype(dtype_of(a.features, "features")),
        flat(a.output == "flatten"),
        temperature(temperature_of(a.temperature)) {
    const Tensor &f = a.features, &w = a.weight;
    const auto type = f.scalar_type();
    TORCH_CHECK(f.dim() == 4 && f.device().is_cpu(), "features: got ", f.dim(), "D on ", f.device(),
                ", expected 4D [N, C, H, W] on cpu");
    TORCH_CHECK(w.dim() == 2, "weight: got ", w.dim(), "D, expected 2D [rows, C]");
    const int64_t n = f.size(0), c = f.size(1), area = f.size(2) * f.size(3), rows = w.size(0);
    const int64_t glimpses = a.v ? a.v->size(0) : rows;
    TORCH_CHECK(area > 0, "features: got shape ", f.sizes(), ", expected positions");
    check(w, "weight", {rows, c}, type);
    check(a.v, "v", {glimpses, rows}, type);
    if (a.v)
      check(a.hidden_term, "hidden_term", {n, rows}, type);
    else
      check(a.hidden_term, "hidden_term", {n, rows, area}, type);
    check(a.mask, "mask", {n, area}, at::kBool);
    format = f.suggest_memory_format();
    layout = flat || a.v ? MemoryFormat::Contiguous : format;
    shape = {n,
             c,
             f.size(2),
             f.size(3),
             glimpses,
             rows,
             a.v.has_value(),
             layout == MemoryFormat::ChannelsLast,
             output_named(a.output)};
    features = f.contiguous(layout);
    weight = w.contiguous();
    hidden_term = backward && !a.v ? a.hidden_term : dense(a.hidden_term);  // looked at, not read
    v = dense(a.v);
    mask = dense(a.mask);
  }

  at::DimVector attended_sizes() const {
    const int64_t maps = shape.glimpses * shape.channels;
    if (flat) return {shape.batch, maps * shape.area()};
    if (shape.output == SpatialOutput::scale) return {shape.batch, maps, shape.height, shape.width};
    if (shape.output == SpatialOutput::sum) return {shape.batch, maps};
    return {shape.batch, shape.glimpses, 2};
  }
  at::DimVector map_sizes() const { return {shape.batch, shape.glimpses, shape.height, shape.width}; }
  bool of_images() const { return shape.output == SpatialOutput::scale && !flat; }

  cpu::SpatialForward arguments(void* attended, const Tensor& map) const {
    return {dtype,
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
  const AttentionCall call(a);
  const auto layout = call.of_images() ? call.layout : MemoryFormat::Contiguous;
  const Tensor attended = at::empty(call.attended_sizes(), a.features.options(), layout);
  const Tensor map = at::empty(call.map_sizes(), a.features.options());
  run_forward(call.arguments(mutable_data_or_null(attended), map));
  return {call.of_images() ? attended.contiguous(call.format) : attended, map};
}

SpatialGradients spatial_attention_backward(const calls::SpatialAttentionBackward& a) {
  const auto& [grad_attended, grad_map, forward, map, output_mask] = a;
  const auto& [features, weight, hidden_term, v, mask, temperature, output] = forward;
  const AttentionCall call(forward, true);
  const auto type = features.scalar_type();
  check(map, "map", call.map_sizes(), type);
  check(grad_map, "grad_map", call.map_sizes(), type);
  check(grad_attended, "grad_attended", call.attended_sizes(), type);
  const std::array<bool, 5> there = {true, true, hidden_term.has_value(), v.has_value(),
                                     temperature.learned_temperature.has_value()};
  for (int i = 0; i < 5; ++i)
    TORCH_CHECK(there[i] || !output_mask[i], "output_mask: got true at ", i, ", expected no absent argument");

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
    const auto layout = call.of_images() ? call.layout : MemoryFormat::Contiguous;
    OptionalTensor grad;
    if (grad_attended) grad = grad_attended->contiguous(layout);
    const OptionalTensor of_map = dense(grad_map);
    const Tensor dense_map = map.contiguous();
    run_backward({call.arguments(nullptr, dense_map), data_or_null(grad), data_or_null(of_map),
                  mutable_data_or_null(grad_features), mutable_data_or_null(grad_weight),
                  mutable_data_or_null(grad_term), mutable_data_or_null(grad_v),
                  output_mask[4] ? &grad_temperature : nullptr, nullptr});
  } else {
    grad_weight.zero_();
    grad_v.zero_();
  }
  return {output_mask[0] ? grad_features.contiguous(call.format) : grad_features, grad_weight, grad_term,
          grad_v, temperature_gradient(grad_temperature, output_mask[4], temperature, features)};
}

namespace {

// Every map a sample of its own, whose scores are the hidden term.
cpu::SpatialForward softmax_call(const Tensor& t, const char* name, const OptionalTensor& mask,
                                 const calls::Temperature& temperature, bool coordinates) {
  const DType dtype = dtype_of(t, name);
  TORCH_CHECK(t.dim() == 4 && t.device().is_cpu(), name, ": got ", t.dim(), "D on ", t.device(),
              ", expected 4D [N, G, H, W] on cpu");
  TORCH_CHECK(t.size(2) > 0 && t.size(3) > 0, name, ": got shape ", t.sizes(), ", expected positions");
  check(mask, "mask", {t.size(0), t.size(1), t.size(2) * t.size(3)}, at::kBool);
  cpu::SpatialForward p{};
  p.dtype = dtype;
  p.shape = {t.size(0) * t.size(1),
             0,
             t.size(2),
             t.size(3),
             1,
             1,
             false,
             false,
             coordinates ? SpatialOutput::coordinates : SpatialOutput::scale};
  p.temperature = temperature_of(temperature);
  return p;
}

std::tuple<Tensor, Tensor> spatial_softmax_forward(const calls::SpatialSoftmaxForward& a) {
  const auto& [logits, mask, temperature, coordinates] = a;
  cpu::SpatialForward p = softmax_call(logits, "logits", mask, temperature, coordinates);
  const Tensor dense_logits = logits.contiguous();
  const OptionalTensor dense_mask = dense(mask);
  const Tensor map = at::empty(logits.sizes(), logits.options());
  const Tensor xy = coordinates ? at::empty({logits.size(0), logits.size(1), 2}, logits.options())
                                : at::empty({0}, logits.options());
  p.hidden_term = dense_logits.const_data_ptr();
  p.mask = bools(dense_mask);
  p.attended = mutable_data_or_null(xy);
  p.map = map.mutable_data_ptr();
  run_forward(p);
  return {map, xy};
}

std::tuple<Tensor, Tensor> spatial_softmax_backward(const calls::SpatialSoftmaxBackward& a) {
  const auto& [grad_map, grad_coordinates, mask, temperature, map, output_mask] = a;
  cpu::SpatialBackward p{};
  p.forward = softmax_call(map, "map", mask, temperature, grad_coordinates.has_value());
  const auto type = map.scalar_type();
  check(grad_map, "grad_map", map.sizes(), type);
  check(grad_coordinates, "grad_coordinates", {map.size(0), map.size(1), 2}, type);
  TORCH_CHECK(temperature.learned_temperature || !output_mask[1],
              "output_mask: got true at 1, expected no absent argument");
  const Tensor dense_map = map.contiguous();
  const OptionalTensor dense_mask = dense(mask), of_map = dense(grad_map), of_xy = dense(grad_coordinates);
  const Tensor grad = output_mask[0] ? at::empty(map.sizes(), map.options()) : at::empty({0}, map.options());
  double grad_temperature = 0;
  p.forward.mask = bools(dense_mask);
  p.forward.map = const_cast<void*>(dense_map.const_data_ptr());
  p.grad_attended = data_or_null(of_xy), p.grad_map = data_or_null(of_map);
  p.grad_term = mutable_data_or_null(grad);
  p.grad_temperature = output_mask[1] ? &grad_temperature : nullptr;
  run_backward(p);
  return {grad, temperature_gradient(grad_temperature, output_mask[1], temperature, map)};
}

}  // namespace

FUSEDNN_BINDINGS(cpu) {
  op(m, "spatial_softmax_forward", &spatial_softmax_forward);
  op(m, "spatial_softmax_backward", &spatial_softmax_backward);
  op(m, "spatial_attention_forward", &spatial_attention_forward);
  op(m, "spatial_attention_backward", &spatial_attention_backward);
}

}  // namespace fusednn
