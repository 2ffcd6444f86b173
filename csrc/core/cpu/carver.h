// Parts of one workspace.
#pragma once

#include <cstddef>

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

// Equal parts of a workspace, one for each thread. `take(carver)` takes what a thread works with.
struct ThreadParts {
  char* base;
  int64_t bytes;  // of each

  template <class F>
  ThreadParts(int threads, Carver& shared, const F& take) {
    Carver one(nullptr);
    take(one);
    bytes = one.bytes;
    base = shared.take<char>(threads * bytes);
  }
  Carver of(int thread) const { return Carver(base ? base + thread * bytes : nullptr); }
};

// Bytes that Pass(p, threads, carver) takes.
template <class Pass, class P>
size_t workspace_bytes(const P& p, int threads) {
  Carver count(nullptr);
  Pass(p, threads, count);
  return count.bytes;
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
