// exp, tanh and sigmoid alone, so that tests can sweep their error on each instruction set.
#pragma once

#include <cstdint>

#include "core/cpu/kernel_table.h"

namespace fusednn::cpu {

struct VectorMath {
  using Function = void (*)(bool wide, int64_t n, const void* x, void* out);  // out[i] = f(x[i])
  Function exp, tanh, sigmoid;
};

}  // namespace fusednn::cpu
