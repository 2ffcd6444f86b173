// How the gate kernels cover a [B, H] state: thread t takes the packs t, t + threads, ... of the rows laid
// end to end, a pack being N neighbouring hidden units of one row.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/cuda/dtypes.h"
#include "core/cuda/launch.h"
#include "core/cuda/vector_access.h"

namespace fusednn::cuda {

constexpr int kGateThreads = 128;
constexpr int64_t kGateMaxBlocks = 4096;
// About one block on each multiprocessor of the largest targets; below it narrower packs give more threads.
constexpr int64_t kGateWantedThreads = 16384;

struct PackPosition {
  int64_t row, column;  // column in elements
};

struct GateTiling {
  int64_t packs_per_row, packs;

  template <int N>
  __device__ PackPosition locate(int64_t pack) const {
    // 64-bit division costs a subroutine call; nearly every problem fits 32 bits.
    const int64_t row =
        packs <= UINT32_MAX
            ? static_cast<int64_t>(static_cast<uint32_t>(pack) / static_cast<uint32_t>(packs_per_row))
            : pack / packs_per_row;
    return {row, (pack - row * packs_per_row) * N};
  }
};

__device__ inline int64_t first_pack() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t pack_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Packs of K gates. Loads of all are issued before any is used, the biases' (zero if null) among them: one
// latency, not one for each gate.
template <class T, int N, int K>
struct GatePacks {
  Pack<T, N> at[K];

  __device__ void load_row(const void* data, int64_t offset, int64_t stride) {
#pragma unroll
    for (int k = 0; k < K; ++k) at[k] = load<T, N>(data, offset + k * stride);
  }

  __device__ void load_bias(const void* data, int64_t offset, int64_t stride) {
#pragma unroll
    for (int k = 0; k < K; ++k) at[k] = Pack<T, N>{};
    if (data != nullptr) load_row(data, offset, stride);
  }

  __device__ void store_row(void* data, int64_t offset, int64_t stride) const {
#pragma unroll
    for (int k = 0; k < K; ++k) store(data, offset + k * stride, at[k]);
  }
};

inline dim3 gate_blocks(const GateTiling& tiling) {
  const int64_t blocks = (tiling.packs + kGateThreads - 1) / kGateThreads;
  return dim3(static_cast<unsigned>(std::min(blocks, kGateMaxBlocks)));
}

// Bytes per access: the largest power of two up to 16 that divides every pointer (null divides by anything)
// and the row, halved while the problem has too few packs to occupy the device.
template <class... Pointers>
int access_bytes(int item_bytes, int64_t batch, int64_t hidden, const Pointers*... pointers) {
  const uint64_t all =
      (static_cast<uint64_t>(hidden * item_bytes) | ... | reinterpret_cast<uintptr_t>(pointers));
  int bytes = static_cast<int>(std::min<uint64_t>(all & (~all + 1), kWidestAccess));
  while (bytes > item_bytes && batch * hidden / (bytes / item_bytes) < kGateWantedThreads) bytes /= 2;
  return bytes;
}

// Calls visit<N>() for the N elements of T that `bytes` hold.
template <class T, int N = kWidestAccess / sizeof(T), class Visit>
cudaError_t visit_width(int bytes, Visit&& visit) {
  if constexpr (N > 1) {
    if (bytes < static_cast<int>(N * sizeof(T))) return visit_width<T, N / 2>(bytes, visit);
  }
  return visit.template operator()<N>();
}

// Launches kernel<T, N>()(p, tiling), for the packs that the pointers allow.
template <class P, class Kernel, class... Pointers>
cudaError_t launch_gates(const P& p, cudaStream_t stream, Kernel&& kernel, const Pointers*... pointers) {
  if (p.batch == 0 || p.hidden == 0) return cudaSuccess;
  return visit_dtype(p.dtype, [&]<class T>(TypeTag<T>) {
    return visit_width<T>(access_bytes(sizeof(T), p.batch, p.hidden, pointers...), [&]<int N>() {
      const GateTiling tiling{p.hidden / N, p.batch * (p.hidden / N)};
      return launch(kernel.template operator()<T, N>(), gate_blocks(tiling), dim3(kGateThreads), 0, stream, p,
                    tiling);
    });
  });
}

}  // namespace fusednn::cuda
