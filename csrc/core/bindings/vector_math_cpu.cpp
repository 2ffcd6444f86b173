#include <ATen/ops/empty_like.h>

#include "core/bindings/op.h"
#include "core/cpu/vector_math.h"

namespace fusednn {
namespace {

struct VectorMathCall {
  std::string function;
  at::Tensor x;
  FUSEDNN_ARGUMENTS(function, x)
};

at::Tensor vector_math(const VectorMathCall& a) {
  const auto& kernels = cpu::kernels<cpu::VectorMath>();
  const cpu::VectorMath::Function function = a.function == "exp"       ? kernels.exp
                                             : a.function == "tanh"    ? kernels.tanh
                                             : a.function == "sigmoid" ? kernels.sigmoid
                                                                       : nullptr;
  TORCH_CHECK_VALUE(function, "function: got ", a.function, ", expected exp, tanh or sigmoid");
  const bool wide = a.x.scalar_type() == at::kDouble;
  TORCH_CHECK(wide || a.x.scalar_type() == at::kFloat, "x: got ", a.x.scalar_type(),
              ", expected float32 or float64");
  const at::Tensor dense = a.x.contiguous();
  at::Tensor out = at::empty_like(dense);
  function(wide, dense.numel(), dense.const_data_ptr(), out.mutable_data_ptr());
  return out;
}

}  // namespace

FUSEDNN_BINDINGS(cpu) { op(m, "vector_math_for_tests", &vector_math); }

}  // namespace fusednn
