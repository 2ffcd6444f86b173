// What every binding asks of its tensors before a kernel touches them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <type_traits>

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

// Checks the tensors of one call against its first, which sets dtype and device.
class CheckedArguments {
 public:
  CheckedArguments(const char* op, const char* name, const at::Tensor& first)
      : op_(op),
        first_name_(name),
        options_(strided(name, first).options()),
        dtype_(dtype_of(first, c10::str(op, ": ", name).c_str())) {}

  const char* op() const { return op_; }
  DType dtype() const { return dtype_; }
  const at::TensorOptions& options() const { return options_; }
  at::ScalarType storage() const { return c10::typeMetaToScalarType(options_.dtype()); }
  // Of arithmetic.
  at::ScalarType wide() const { return dtype_ == DType::f64 ? at::kDouble : at::kFloat; }
  at::TensorOptions wide_options() const { return options_.dtype(wide()); }

  void on_device(const char* name, const at::Tensor& t) const {
    TORCH_CHECK(strided(name, t).device() == options_.device(), op_, ": ", name, ": got a tensor on ",
                t.device(), ", expected ", options_.device(), " as ", first_name_);
  }

  template <class MaybeTensor>
  void check(const char* name, const MaybeTensor& given, at::IntArrayRef sizes, at::ScalarType type) const {
    if constexpr (std::is_same_v<MaybeTensor, OptionalTensor>) {
      if (given) check(name, *given, sizes, type);
    } else {
      TORCH_CHECK(strided(name, given).sizes() == sizes, op_, ": ", name, ": got shape ", given.sizes(),
                  ", expected ", sizes);
      TORCH_CHECK(given.scalar_type() == type, op_, ": ", name, ": got dtype ", given.scalar_type(),
                  ", expected ", type, type == storage() ? c10::str(" as ", first_name_) : "");
      on_device(name, given);
    }
  }
  template <class MaybeTensor>
  void check(const char* name, const MaybeTensor& given, at::IntArrayRef sizes) const {
    check(name, given, sizes, storage());
  }

  // `given` without holes, in this memory format.
  template <class MaybeTensor>
  MaybeTensor dense(const char* name, const MaybeTensor& given, at::IntArrayRef sizes,
                    at::MemoryFormat format = at::MemoryFormat::Contiguous) const {
    check(name, given, sizes);
    if constexpr (std::is_same_v<MaybeTensor, OptionalTensor>)
      return given ? OptionalTensor(given->contiguous(format)) : given;
    else
      return given.contiguous(format);
  }

  // A size as kernels take it, which compute small multiples in int.
  int small(const char* name, int64_t value, int64_t most = std::numeric_limits<int>::max() / 4) const {
    TORCH_CHECK(value >= 0 && value <= most, op_, ": ", name, ": got ", value, ", expected 0 to ", most);
    return static_cast<int>(value);
  }

 private:
  const at::Tensor& strided(const char* name, const at::Tensor& t) const {
    TORCH_CHECK(t.defined() && t.layout() == at::kStrided, op_, ": ", name, ": expected a strided tensor");
    return t;
  }

  const char* op_;
  const char* first_name_;
  at::TensorOptions options_;
  DType dtype_;
};

// A gradient as an op returns it: empty where it is not wanted.
inline at::Tensor or_empty(bool wanted, const at::Tensor& t, const at::Tensor& like) {
  return wanted ? t : at::empty({0}, like.options());
}

}  // namespace fusednn
