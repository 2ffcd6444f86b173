// Parts of one workspace.
#pragma once

#include "core/cpu/integer.h"

namespace fusednn::cpu::FUSEDNN_ISA {

// Hands out parts of a workspace, each on a cache line of its own; without a workspace it counts bytes.
struct Carver {
  char* base;
  int64_t bytes = 0;
  explicit Carver(void* workspace) : base(static_cast<char*>(workspace)) {}
  template <class T>
  T* take(int64_t count) {
    char* const at = base ? base + bytes : nullptr;
    bytes += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return reinterpret_cast<T*>(at);
  }
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
