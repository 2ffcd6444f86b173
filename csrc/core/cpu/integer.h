// Index arithmetic.
#pragma once

#include "core/cpu/isa.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

// Calls f<n>() where n is in [1, Most]: a count known at run time becomes a constant of the kernel.
template <int Most, class F>
FUSEDNN_INLINE void with_count(int64_t n, const F& f) {
  static_assert(Most <= 12);
  switch (n) {
#define FUSEDNN_CASE(N)                                  \
  case N:                                                \
    if constexpr (N <= Most) f.template operator()<N>(); \
    break;
    FUSEDNN_CASE(1)
    FUSEDNN_CASE(2)
    FUSEDNN_CASE(3)
    FUSEDNN_CASE(4)
    FUSEDNN_CASE(5)
    FUSEDNN_CASE(6)
    FUSEDNN_CASE(7)
    FUSEDNN_CASE(8)
    FUSEDNN_CASE(9)
    FUSEDNN_CASE(10)
    FUSEDNN_CASE(11)
    FUSEDNN_CASE(12)
#undef FUSEDNN_CASE
    default:
      break;
  }
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
