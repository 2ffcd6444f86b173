// Index arithmetic of launchers and kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

namespace fusednn::cuda {

template <class A, class B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// Grids are one-dimensional: 2^31 - 1 blocks.
inline bool grid_fits(int64_t blocks) { return blocks <= std::numeric_limits<int>::max(); }

// Whether all pointers are multiples of `bytes`, a power of two; null is.
template <class... Pointers>
bool aligned(size_t bytes, const Pointers*... pointers) {
  return ((... | reinterpret_cast<uintptr_t>(pointers)) & (bytes - 1)) == 0;
}

}  // namespace fusednn::cuda
