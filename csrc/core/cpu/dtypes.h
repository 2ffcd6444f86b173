// From a dtype at run time to the types that kernels are templates of.
#pragma once

#include "core/cpu/vec.h"

namespace fusednn::cpu::FUSEDNN_ISA {

// Calls f<T, S>() with the accumulator and the storage type of `dtype`.
template <class F>
auto with_types(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64:
      return f.template operator()<double, double>();
    case DType::f16:
      return f.template operator()<float, Half>();
    case DType::bf16:
      return f.template operator()<float, BFloat16>();
    default:
      return f.template operator()<float, float>();
  }
}

// Calls f<T>() with an accumulator's type: double if `wide`, else float.
template <class F>
auto with_accumulator(bool wide, const F& f) {
  return wide ? f.template operator()<double>() : f.template operator()<float>();
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
