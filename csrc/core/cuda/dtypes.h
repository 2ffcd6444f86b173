// From a storage type's name to the type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "core/dtype.h"

namespace fusednn::cuda {

template <class T>
struct TypeTag {
  using type = T;
};

// Calls visit(TypeTag<T>).
template <class Visit>
cudaError_t visit_dtype(DType dtype, Visit&& visit) {
  switch (dtype) {
    case DType::f32:
      return visit(TypeTag<float>{});
    case DType::f64:
      return visit(TypeTag<double>{});
    case DType::f16:
      return visit(TypeTag<__half>{});
    case DType::bf16:
      return visit(TypeTag<__nv_bfloat16>{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace fusednn::cuda
