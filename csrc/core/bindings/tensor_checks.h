// What every binding asks of its tensors before a kernel touches them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/dtype.h"

namespace fusednn {

using OptionalTensor = std::optional<at::Tensor>;

inline DType dtype_of(const at::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::f32;
    case at::kDouble:
      return DType::f64;
    case at::kHalf:
      return DType::f16;
    case at::kBFloat16:
      return DType::bf16;
    default:
      TORCH_CHECK(false, name, ": got dtype ", t.scalar_type(),
                  ", expected float32, float64, bfloat16 or float16");
  }
}

inline void check(const at::Tensor& t, const char* name, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK(t.device().is_cpu(), name, ": got a tensor on ", t.device(), ", expected cpu");
  TORCH_CHECK(t.sizes() == sizes, name, ": got shape ", t.sizes(), ", expected ", sizes);
  TORCH_CHECK(t.scalar_type() == dtype, name, ": got ", t.scalar_type(), ", expected ", dtype);
}

inline void check(const OptionalTensor& t, const char* name, at::IntArrayRef sizes, at::ScalarType dtype) {
  if (t) check(*t, name, sizes, dtype);
}

inline const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

}  // namespace fusednn
