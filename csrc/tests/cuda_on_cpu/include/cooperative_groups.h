// Stand-in for the toolkit's header: thread blocks, tiles of a warp and the grid.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

class grid_group {
 public:
  void sync(CUDA_ON_CPU_CALLER) const { cuda_on_cpu::sync_grid({file, line}); }
  bool is_valid() const { return true; }
  unsigned long long num_blocks() const { return 1ull * gridDim.x * gridDim.y * gridDim.z; }
  unsigned long long block_rank() const {
    return (1ull * blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  }
  unsigned long long num_threads() const { return num_blocks() * blockDim.x * blockDim.y * blockDim.z; }
  unsigned long long size() const { return num_threads(); }
  unsigned long long thread_rank() const {
    return block_rank() * blockDim.x * blockDim.y * blockDim.z +
           (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  }
  dim3 group_dim() const { return gridDim; }
};

class thread_block {
 public:
  void sync(CUDA_ON_CPU_CALLER) const { __syncthreads(file, line); }
  unsigned thread_rank() const { return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x; }
  unsigned num_threads() const { return blockDim.x * blockDim.y * blockDim.z; }
  unsigned size() const { return num_threads(); }
  uint3 group_index() const { return blockIdx; }
  uint3 thread_index() const { return threadIdx; }
  dim3 group_dim() const { return blockDim; }
};

// `Size` neighbouring lanes.
template <unsigned Size>
class thread_block_tile {
  static_assert(Size >= 1 && Size <= 32 && (Size & (Size - 1)) == 0);

 public:
  unsigned thread_rank() const { return cuda_on_cpu::lane() % Size; }
  static constexpr unsigned num_threads() { return Size; }
  static constexpr unsigned size() { return Size; }
  unsigned meta_group_rank() const { return thread_block().thread_rank() / Size; }
  unsigned meta_group_size() const { return (thread_block().size() + Size - 1) / Size; }

  void sync(CUDA_ON_CPU_CALLER) const { __syncwarp(mask(), file, line); }
  template <class T>
  T shfl(T value, int source, CUDA_ON_CPU_CALLER) const {
    return __shfl_sync(mask(), value, source, Size, file, line);
  }
  template <class T>
  T shfl_up(T value, unsigned delta, CUDA_ON_CPU_CALLER) const {
    return __shfl_up_sync(mask(), value, delta, Size, file, line);
  }
  template <class T>
  T shfl_down(T value, unsigned delta, CUDA_ON_CPU_CALLER) const {
    return __shfl_down_sync(mask(), value, delta, Size, file, line);
  }
  template <class T>
  T shfl_xor(T value, int lane_mask, CUDA_ON_CPU_CALLER) const {
    return __shfl_xor_sync(mask(), value, lane_mask, Size, file, line);
  }
  bool any(int predicate, CUDA_ON_CPU_CALLER) const { return __any_sync(mask(), predicate, file, line); }
  bool all(int predicate, CUDA_ON_CPU_CALLER) const { return __all_sync(mask(), predicate, file, line); }
  unsigned ballot(int predicate, CUDA_ON_CPU_CALLER) const {
    return __ballot_sync(mask(), predicate, file, line) >> first();
  }

 private:
  static unsigned first() { return cuda_on_cpu::lane() / Size * Size; }
  static unsigned mask() { return (cuda_on_cpu::full_mask >> (32 - Size)) << first(); }
};

inline grid_group this_grid() { return {}; }
inline thread_block this_thread_block() { return {}; }

template <unsigned Size>
thread_block_tile<Size> tiled_partition(const thread_block&) {
  return {};
}

template <class Group>
void sync(const Group& group, CUDA_ON_CPU_CALLER) {
  group.sync(file, line);
}

}  // namespace cooperative_groups
