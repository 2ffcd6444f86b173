// Sums and maxima over the threads of a warp and of a block, in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include <limits>

#include "core/cuda/launch.h"

namespace fusednn::cuda {

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

template <class A, class Combine>
__device__ __forceinline__ A warp_reduce(A x, Combine&& combine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

struct Sum {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a + b;
  }
};

struct Max {
  template <class A>
  __device__ A operator()(A a, A b) const {
    return a > b ? a : b;
  }
};

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
  return warp_reduce(x, Sum{});
}

template <class A>
__device__ __forceinline__ A warp_max(A x) {
  return warp_reduce(x, Max{});
}

// Of a block of `Warps` warps, through the first `Warps` numbers of its dynamic shared memory.
template <int Warps, class A, class Combine>
__device__ A block_reduce(A x, Combine&& combine) {
  A* shared = dynamic_shared<A>();
  x = warp_reduce(x, combine);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[0];
#pragma unroll
  for (int w = 1; w < Warps; ++w) x = combine(x, shared[w]);
  __syncthreads();
  return x;
}

template <int Warps, class A>
__device__ A block_sum(A x) {
  return block_reduce<Warps>(x, Sum{});
}

template <int Warps, class A>
__device__ A block_max(A x) {
  return block_reduce<Warps>(x, Max{});
}

}  // namespace fusednn::cuda
