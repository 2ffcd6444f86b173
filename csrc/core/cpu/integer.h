// Index arithmetic.
#pragma once

#include "core/cpu/isa.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace fusednn::cpu::FUSEDNN_ISA
