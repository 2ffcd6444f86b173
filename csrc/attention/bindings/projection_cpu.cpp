// fusednn._C.cpu: linear maps of many rows on CPU tensors; schemas as in fusednn/attention/projection_ops.py.
#include <ATen/ops/sum.h>

#include "attention/bindings/cpu.h"
#include "attention/cpu/projection_params.h"
#include "core/bindings/cpu_kernel.h"
#include "core/bindings/op.h"

namespace fusednn {

using at::Tensor;
using cpu::MatrixProduct;

namespace {

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

Tensor packed(const Tensor& t, int64_t columns, int64_t depth, int64_t column_stride, int64_t depth_stride) {
  const auto& kernels = cpu::kernels<cpu::ProjectionKernels>();
  const Tensor to = at::empty({kernels.packed_elements(columns, depth)}, t.options());
  kernels.pack(
      {columns, depth, t.const_data_ptr<float>(), column_stride, depth_stride, to.mutable_data_ptr<float>()},
      torch_parallel());
  return to;
}

// out = a panels, without bias; `a` as it stands or, transposed, by its columns.
MatrixProduct product(const Tensor& a, bool transposed, const Tensor& panels, const Tensor& out) {
  MatrixProduct p{};
  p.rows = out.size(0), p.columns = out.size(1), p.depth = a.size(transposed ? 0 : 1);
  p.a = a.const_data_ptr<float>();
  p.a_row_stride = transposed ? 1 : a.stride(0), p.a_depth_stride = transposed ? a.stride(0) : 1;
  p.packed = panels.const_data_ptr<float>();
  p.out = out.mutable_data_ptr<float>(), p.out_row_stride = out.size(1);
  return p;
}

void run(const MatrixProduct& p) {
  const auto& kernels = cpu::kernels<cpu::ProjectionKernels>();
  run_kernel(kernels.workspace, kernels.multiply, p);
}

}  // namespace

Tensor projection_forward(const calls::ProjectionForward& a) {
  const Sizes s = sizes_of(a.input, a.weight);
  check(a.bias, "bias", {s.outputs}, at::kFloat);
  Tensor out = at::empty({s.rows, s.outputs}, a.input.options());
  if (out.numel() == 0) return out;
  if (s.inputs == 0) return a.bias ? out.copy_(*a.bias) : out.zero_();
  const Tensor x = with_dense_rows(a.input), w = with_dense_rows(a.weight);
  const OptionalTensor b = dense(a.bias);
  const Tensor panels = packed(w, s.outputs, s.inputs, w.stride(0), 1);
  MatrixProduct p = product(x, false, panels, out);
  p.bias = b ? b->const_data_ptr<float>() : nullptr;
  run(p);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> projection_backward(const calls::ProjectionBackward& a) {
  const auto& [grad, input, weight, output_mask] = a;
  const Sizes s = sizes_of(input, weight);
  check(grad, "grad_output", {s.rows, s.outputs}, at::kFloat);
  const auto empty = [&](bool wanted, at::IntArrayRef sizes) {
    return at::empty(wanted ? sizes : at::IntArrayRef{0}, a.input.options());
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
  const Tensor g = with_dense_rows(grad), x = with_dense_rows(input), w = with_dense_rows(weight);
  if (output_mask[0]) {
    const Tensor panels = packed(w, s.inputs, s.outputs, 1, w.stride(0));
    run(product(g, false, panels, d_input));
  }
  if (output_mask[1]) {
    const Tensor panels = packed(x, s.inputs, s.rows, 1, x.stride(0));
    MatrixProduct p = product(g, true, panels, d_weight);
    p.row_sums = output_mask[2] ? d_bias.mutable_data_ptr<float>() : nullptr;
    run(p);
    return {d_input, d_weight, d_bias};
  }
  if (output_mask[2]) at::sum_out(const_cast<Tensor&>(d_bias), g, 0);
  return {d_input, empty(false, {}), d_bias};
}

FUSEDNN_BINDINGS(cpu) {
  op(m, "projection_forward", &projection_forward);
  op(m, "projection_backward", &projection_backward);
}

}  // namespace fusednn
