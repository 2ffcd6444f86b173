// fusednn._C.cpu: linear maps of many rows on CPU tensors; schemas as in fusednn/attention/projection_ops.py.
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

#include <array>

#include "attention/bindings/cpu.h"
#include "attention/cpu/projection_params.h"
#include "core/bindings/bindings.h"
#include "core/bindings/scratch.h"
#include "core/bindings/tensor_checks.h"
#include "core/bindings/torch_parallel.h"
#include "core/bindings/weight_cache.h"
#include "core/cpu/features.h"

namespace fusednn {

using at::Tensor;
using cpu::MatrixProduct;

namespace {

constexpr int kProjectionVariants = 192;  // in the weight cache, beside those of other kernels

struct Sizes {
  int64_t rows, inputs, outputs;
};

Sizes sizes_of(const Tensor& input, const Tensor& weight) {
  TORCH_CHECK(input.dim() == 2 && weight.dim() == 2, "input, weight: got shapes ", input.sizes(), " and ",
              weight.sizes(), ", expected [M, K] and [N, K]");
  const Sizes s{input.size(0), input.size(1), weight.size(0)};
  check(input, "input", {s.rows, s.inputs}, at::kFloat);
  check(weight, "weight", {s.outputs, s.inputs}, at::kFloat);
  return s;
}

Tensor dense_rows(const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : t.contiguous(); }

Tensor packed(const Tensor& t, int64_t columns, int64_t depth, int64_t column_stride, int64_t depth_stride) {
  const cpu::ProjectionKernels& kernels = cpu::projection_kernels();
  const Tensor to = at::empty({kernels.packed_elements(columns, depth)}, t.options());
  kernels.pack(
      {columns, depth, t.const_data_ptr<float>(), column_stride, depth_stride, to.mutable_data_ptr<float>()},
      torch_parallel());
  return to;
}

void run(MatrixProduct& p) {
  const cpu::ProjectionKernels& kernels = cpu::projection_kernels();
  const cpu::Parallel threads = torch_parallel();
  const Scratch scratch(kernels.workspace(p, threads.threads));
  p.workspace = scratch.data();
  kernels.multiply(p, threads);
}

}  // namespace

Tensor projection_forward(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const Sizes s = sizes_of(input, weight);
  check(bias, "bias", {s.outputs}, at::kFloat);
  const Tensor out = at::empty({s.rows, s.outputs}, input.options());
  if (out.numel() == 0) return out;
  if (s.inputs == 0) return bias ? out.copy_(*bias) : out.zero_();
  const Tensor x = dense_rows(input), w = dense_rows(weight);
  OptionalTensor b;
  if (bias) b = bias->contiguous();
  const auto pack = [&] { return packed(w, s.outputs, s.inputs, w.stride(0), 1); };
  const int variant = kProjectionVariants + static_cast<int>(cpu::current_isa());
  Tensor panels = WeightCache::instance().find({weight}, variant, pack);
  if (!panels.defined()) panels = pack();
  MatrixProduct p{};
  p.rows = s.rows, p.columns = s.outputs, p.depth = s.inputs;
  p.a = x.const_data_ptr<float>(), p.a_row_stride = x.stride(0), p.a_depth_stride = 1;
  p.packed = panels.const_data_ptr<float>();
  p.bias = b ? b->const_data_ptr<float>() : nullptr;
  p.out = out.mutable_data_ptr<float>(), p.out_row_stride = s.outputs;
  run(p);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> projection_backward(const Tensor& grad, const Tensor& input,
                                                       const Tensor& weight,
                                                       std::array<bool, 3> output_mask) {
  const Sizes s = sizes_of(input, weight);
  check(grad, "grad", {s.rows, s.outputs}, at::kFloat);
  const auto empty = [&](bool wanted, at::IntArrayRef sizes) {
    return at::empty(wanted ? sizes : at::IntArrayRef{0}, input.options());
  };
  const Tensor d_input = empty(output_mask[0], {s.rows, s.inputs});
  const Tensor d_weight = empty(output_mask[1] || output_mask[2], {s.outputs, s.inputs});
  const Tensor d_bias = empty(output_mask[2], {s.outputs});
  if (s.rows * s.inputs * s.outputs == 0) {
    if (output_mask[2] && s.rows > 0 && s.outputs > 0)
      at::sum_out(const_cast<Tensor&>(d_bias), grad, 0);
    else
      d_bias.zero_();
    return {d_input.zero_(), output_mask[1] ? d_weight.zero_() : empty(false, {}), d_bias};
  }
  const Tensor g = dense_rows(grad), x = dense_rows(input), w = dense_rows(weight);
  if (output_mask[0]) {
    const Tensor panels = packed(w, s.inputs, s.outputs, 1, w.stride(0));
    MatrixProduct p{};
    p.rows = s.rows, p.columns = s.inputs, p.depth = s.outputs;
    p.a = g.const_data_ptr<float>(), p.a_row_stride = g.stride(0), p.a_depth_stride = 1;
    p.packed = panels.const_data_ptr<float>();
    p.out = d_input.mutable_data_ptr<float>(), p.out_row_stride = s.inputs;
    run(p);
  }
  if (output_mask[1]) {
    const Tensor panels = packed(x, s.inputs, s.rows, 1, x.stride(0));
    MatrixProduct p{};
    p.rows = s.outputs, p.columns = s.inputs, p.depth = s.rows;
    p.a = g.const_data_ptr<float>(), p.a_row_stride = 1, p.a_depth_stride = g.stride(0);
    p.packed = panels.const_data_ptr<float>();
    p.out = d_weight.mutable_data_ptr<float>(), p.out_row_stride = s.inputs;
    p.row_sums = output_mask[2] ? d_bias.mutable_data_ptr<float>() : nullptr;
    run(p);
    return {d_input, d_weight, d_bias};
  }
  if (output_mask[2]) at::sum_out(const_cast<Tensor&>(d_bias), g, 0);
  return {d_input, empty(false, {}), d_bias};
}

void bind_projection_cpu(pybind11::module_& m) {
  m.def("projection_forward", &projection_forward);
  m.def("projection_backward", &projection_backward);
}

}  // namespace fusednn
