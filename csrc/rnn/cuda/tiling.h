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

template <int N>
struct PackWidth {
  static constexpr int value = N;
};

template <class T, int N = kWidestAccess / sizeof(T), class Visit>
cudaError_t visit_width(int bytes, Visit&& visit) {
  if constexpr (N > 1) {
    if (bytes < static_cast<int>(N * sizeof(T))) return visit_width<T, N / 2>(bytes, visit);
  }
  return visit(TypeTag<T>{}, PackWidth<N>{});
}

// Calls visit(TypeTag<T>, PackWidth<N>) for the storage type and the widest access that the arguments allow.
template <class Visit, class... Pointers>
cudaError_t visit_packs(DType dtype, int64_t batch, int64_t hidden, Visit&& visit,
                        const Pointers*... pointers) {
  const auto with = [&]<class T>(TypeTag<T>) {
    return visit_width<T>(access_bytes(sizeof(T), batch, hidden, pointers...), visit);
  };
  return visit_dtype(dtype, with);
}

template <int N>
GateTiling gate_tiling(int64_t batch, int64_t hidden) {
  return {hidden / N, batch * (hidden / N)};
}

}  // namespace fusednn::cuda
