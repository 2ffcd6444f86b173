// Kernels with a planted fault, each beside its healthy twin: the proof that the machinery reports what it
// should and nothing else. tests/test_native.py looks for the lines marked "planted:" in the reports.
#include <cooperative_groups.h>

#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "check.h"
#include "core/cuda/launch.h"
#include "cuda_on_cpu.h"
#include "in_order.h"

using fusednn::cuda::dynamic_shared;
using fusednn::cuda::launch;
using fusednn::cuda::launch_cooperative;

namespace {

constexpr int block = 64;

// out[blockIdx] = sum of the block's part of x. Without Wait nothing orders the first loads of `partial`
// after the other warps' stores.
template <bool Wait>
__global__ void block_sum(const float* x, float* out) {
  __shared__ float partial[block];
  const int t = threadIdx.x;
  partial[t] = x[blockIdx.x * block + t];
  if (Wait) __syncthreads();
  for (int step = block / 2; step > 0; step /= 2) {
    if (t < step) partial[t] += partial[t + step];  // planted: missing_barrier
    __syncthreads();
  }
  if (t == 0) out[blockIdx.x] = partial[0];
}

template <bool Wait>
__global__ void warp_reverse(float* x) {
  float* staged = dynamic_shared<float>();
  staged[threadIdx.x] = x[threadIdx.x];
  if (Wait) __syncwarp();
  x[threadIdx.x] = staged[31 - threadIdx.x];  // planted: missing_syncwarp
}

// Every block adds to one sum; the healthy ones by an atomic.
template <bool Atomic>
__global__ void grid_sum(float* sum) {
  if (Atomic) {
    atomicAdd(sum, 1.0f);
  } else {
    *sum += 1.0f;  // planted: blocks_race
  }
}

template <bool Wait>
__global__ void neighbours(const int* x, int* staged, int* out) {
  staged[blockIdx.x] = x[blockIdx.x];
  if (Wait) cooperative_groups::this_grid().sync();
  out[blockIdx.x] = staged[(blockIdx.x + 1) % gridDim.x];  // planted: missing_grid_sync
}

// x[i] = old x[i + reach] through dynamic shared memory.
__global__ void shift(float* x, int reach) {
  float* staged = dynamic_shared<float>();
  const int t = threadIdx.x;
  staged[t] = x[t];
  __syncthreads();
  x[t] = staged[t + reach];  // planted: shared_out_of_bounds
}

__global__ void shift_static(float* x, int reach) {
  __shared__ float staged[block];
  const int t = threadIdx.x;
  const float* from = staged + t + reach;  // through a pointer, which hides the array's size
  staged[t] = x[t];
  __syncthreads();
  x[t] = *from;  // planted: static_out_of_bounds
}

__global__ void scale(float* x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] *= 2.0f;  // planted: global_out_of_bounds
}

__global__ void scale4(float* x) {
  auto* v = reinterpret_cast<float4*>(x) + threadIdx.x;
  v->x *= 2.0f;  // planted: misaligned
}

// x through dynamic shared memory, which an access for global memory alone doesn't reach.
template <bool Global>
__global__ void stages(float* x) {
  float* staged = dynamic_shared<float>();
  const int t = threadIdx.x;
  if (Global) {
    __stwb(staged + t, x[t]);
  } else {
    staged[t] = __ldca(x + t);
  }
  __stwb(x + t, 2.0f * staged[t]);
}

__global__ void leaves_early(int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  __syncthreads();
}

__global__ void branches(int n) {
  if (static_cast<int>(threadIdx.x) < n) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffles(unsigned mask, int lanes, int* out) {
  if (static_cast<int>(threadIdx.x) < lanes)
    out[threadIdx.x] = __shfl_xor_sync(mask, static_cast<int>(threadIdx.x), 1);
}

__global__ void block_or_warp() {
  if (threadIdx.x == 3) {
    __syncthreads();
  } else {
    __ballot_sync(0xffffffffu, 1);
  }
}

__global__ void spins(int* flag) {
  while (atomicAdd(flag, 0) == 0) __nanosleep(10);
}

__global__ void static_in_grid(int* out) {
  __shared__ int x[1];
  x[0] = 1;
  out[blockIdx.x] = x[0];
}

std::vector<float> ones(size_t n) { return std::vector<float>(n, 1.0f); }

template <bool Wait>
cudaError_t sum_blocks(std::vector<float>& out) {
  std::vector<float> x(out.size() * block);
  std::iota(x.begin(), x.end(), 0.0f);
  return launch(block_sum<Wait>, static_cast<unsigned>(out.size()), block, 0, nullptr, x.data(), out.data());
}

bool reported(cudaError_t error, std::initializer_list<const char*> parts) {
  if (error != cudaErrorLaunchFailure) return false;
  for (const char* part : parts) {
    if (std::strstr(cudaGetErrorString(error), part) != nullptr) continue;
    std::printf("got \"%s\", expected it to contain \"%s\"\n", cudaGetErrorString(error), part);
    return false;
  }
  return true;
}

}  // namespace

TEST(healthy_block_sum) {
  std::vector<float> out(3);
  CHECK(sum_blocks<true>(out) == cudaSuccess);
  for (int i = 0; i < 3; ++i) CHECK_EQUAL(out[i], block * block * i + block * (block - 1) / 2);
}
PLANTED(missing_barrier) {
  std::vector<float> out(3);
  CHECK(sum_blocks<false>(out) == cudaSuccess);
}

TEST(healthy_warp_reverse) {
  std::vector<float> x(32);
  std::iota(x.begin(), x.end(), 0.0f);
  CHECK(launch(warp_reverse<true>, 1, 32, 32 * sizeof(float), nullptr, x.data()) == cudaSuccess);
  for (int i = 0; i < 32; ++i) CHECK_EQUAL(x[i], 31 - i);
}
PLANTED(missing_syncwarp) {
  std::vector<float> x = ones(32);
  CHECK(launch(warp_reverse<false>, 1, 32, 32 * sizeof(float), nullptr, x.data()) == cudaSuccess);
}

TEST(healthy_grid_sum) {
  float sum = 0.0f;
  CHECK(launch(grid_sum<true>, 10, 1, 0, nullptr, &sum) == cudaSuccess);
  CHECK_EQUAL(sum, 10.0f);
}
PLANTED(blocks_race) {
  float sum = 0.0f;
  CHECK(launch(grid_sum<false>, 10, 1, 0, nullptr, &sum) == cudaSuccess);
}

TEST(healthy_grid_sync) {
  const int x[4] = {1, 2, 3, 4};
  int staged[4], out[4];
  CHECK(launch_cooperative(neighbours<true>, 4, 1, 0, nullptr, x, staged, out) == cudaSuccess);
  CHECK(out[0] == 2 && out[3] == 1);
}
PLANTED(missing_grid_sync) {
  const int x[4] = {1, 2, 3, 4};
  int staged[4] = {}, out[4];
  CHECK(launch_cooperative(neighbours<false>, 4, 1, 0, nullptr, x, staged, out) == cudaSuccess);
}

TEST(healthy_bounds) {
  std::vector<float> x = ones(block);
  CHECK(launch(shift, 1, block, block * sizeof(float), nullptr, x.data(), 0) == cudaSuccess);
  CHECK(launch(shift_static, 1, block, 0, nullptr, x.data(), 0) == cudaSuccess);
  CHECK(launch(scale, 2, 48, 0, nullptr, x.data(), block) == cudaSuccess);
  CHECK_EQUAL(x[block - 1], 2.0f);
}
PLANTED(shared_out_of_bounds) {
  std::vector<float> x = ones(block);
  CHECK(launch(shift, 1, block, block * sizeof(float), nullptr, x.data(), 1) == cudaSuccess);
}
PLANTED(static_out_of_bounds) {
  std::vector<float> x = ones(block);
  CHECK(launch(shift_static, 1, block, 0, nullptr, x.data(), 1) == cudaSuccess);
}
PLANTED(global_out_of_bounds) {
  std::vector<float> x = ones(block);
  CHECK(launch(scale, 2, 48, 0, nullptr, x.data(), block + 1) == cudaSuccess);
}

TEST(healthy_alignment) {
  alignas(16) float x[9] = {1.0f};
  CHECK(launch(scale4, 1, 2, 0, nullptr, x) == cudaSuccess);
  CHECK_EQUAL(x[0], 2.0f);
}
PLANTED(misaligned) {
  alignas(16) float x[9] = {1.0f};
  CHECK(launch(scale4, 1, 2, 0, nullptr, x + 1) == cudaSuccess);
}

TEST(global_access_of_shared_memory) {
  const InOrder scope(cuda_on_cpu::Order::forward);
  std::vector<float> x = ones(block);
  CHECK(launch(stages<false>, 1, block, block * sizeof(float), nullptr, x.data()) == cudaSuccess);
  CHECK_EQUAL(x[block - 1], 2.0f);
  CHECK(reported(launch(stages<true>, 1, block, block * sizeof(float), nullptr, x.data()),
                 {"bad address: thread (0,0,0) of block (0,0,0) gives shared memory to __stwb (faults.cu:"}));
}

TEST(divergent_barrier_after_an_exit) {
  const InOrder scope(cuda_on_cpu::Order::forward);
  CHECK(launch(leaves_early, 1, 64, 0, nullptr, 64) == cudaSuccess);
  CHECK(launch(leaves_early, 1, 64, 0, nullptr, 0) == cudaSuccess);
  CHECK(reported(launch(leaves_early, 2, 64, 0, nullptr, 40),
                 {"divergent barrier: thread (0,0,0) of block (0,0,0) waits at __syncthreads (faults.cu:",
                  "but thread (40,0,0) of block (0,0,0) has exited (24 of 64 never came)"}));
}

TEST(divergent_barrier_in_branches) {
  const InOrder scope(cuda_on_cpu::Order::forward);
  CHECK(launch(branches, 1, 64, 0, nullptr, 64) == cudaSuccess);
  CHECK(reported(
      launch(branches, 1, 64, 0, nullptr, 40),
      {"divergent barrier: thread (0,0,0)", "but thread (40,0,0) of block (0,0,0) waits at __syncthreads"}));
}

TEST(divergent_block_and_warp) {
  const InOrder scope(cuda_on_cpu::Order::forward);
  CHECK(reported(launch(block_or_warp, 1, 32, 0, nullptr),
                 {"thread (0,0,0) of block (0,0,0) waits at __ballot_sync of lanes 0xffffffff (faults.cu:",
                  "but thread (3,0,0) of block (0,0,0) waits at __syncthreads (faults.cu:"}));
}

TEST(divergent_shuffle) {
  const InOrder scope(cuda_on_cpu::Order::forward);
  int out[32];
  CHECK(launch(shuffles, 1, 32, 0, nullptr, 0xffffffffu, 32, out) == cudaSuccess);
  CHECK_EQUAL(out[5], 4);
  CHECK(launch(shuffles, 1, 48, 0, nullptr, 0x000000ffu, 8, out) == cudaSuccess);
  CHECK(reported(
      launch(shuffles, 1, 32, 0, nullptr, 0xffffffffu, 31, out),
      {"waits at __shfl_xor_sync of lanes 0xffffffff", "thread (31,0,0) of block (0,0,0) has exited"}));
  CHECK(reported(launch(shuffles, 1, 16, 0, nullptr, 0xffffffffu, 32, out),
                 {"bad mask", "names lane 16, which does not exist: the block has 16 threads"}));
  CHECK(reported(launch(shuffles, 1, 32, 0, nullptr, 0x0000000fu, 8, out),
                 {"bad mask: thread (4,0,0)", "does not name its own lane 4"}));
}

TEST(spin_without_progress) {
  const InOrder scope(cuda_on_cpu::Order::forward);
  int flag = 0;
  CHECK(reported(launch(spins, 1, 2, 0, nullptr, &flag),
                 {"no thread advances: thread (0,0,0) of block (0,0,0) spins"}));
  flag = 1;
  CHECK(launch(spins, 1, 2, 0, nullptr, &flag) == cudaSuccess);
}

TEST(static_shared_in_a_cooperative_grid) {
  int out[2] = {};
  CHECK(launch_cooperative(static_in_grid, 1, 1, 0, nullptr, out) == cudaSuccess);
  CHECK_EQUAL(out[0], 1);
  CHECK(reported(launch_cooperative(static_in_grid, 2, 1, 0, nullptr, out),
                 {"static __shared__ (", "faults.cu:", "in a cooperative launch of several blocks"}));
}
