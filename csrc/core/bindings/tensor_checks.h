// What every binding asks of its tensors before a kernel touches them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "core/bindings/arguments.h"
#include "core/dtype.h"

namespace fusednn {

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

// The dtype of arithmetic on `t`.
inline at::ScalarType wide_dtype(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
inline const void* data_or_null(const at::Tensor& t) {
  return t.defined() && t.numel() > 0 ? t.const_data_ptr() : nullptr;
}
inline void* mutable_data_or_null(const at::Tensor& t) {
  return t.defined() && t.numel() > 0 ? t.mutable_data_ptr() : nullptr;
}

inline OptionalTensor dense(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

// The same values with neighbours in the last dimension next to each other; a view where they are already.
inline at::Tensor with_dense_rows(const at::Tensor& t) {
  return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous();
}

// A gradient as an op returns it: empty where it is not wanted.
inline at::Tensor or_empty(bool wanted, const at::Tensor& t, const at::Tensor& like) {
  return wanted ? t : at::empty({0}, like.options());
}

}  // namespace fusednn
