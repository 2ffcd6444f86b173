// What a kernel may count on when it runs on the CPU: collectives, barriers, grids, memory, orders, errors.
#include <cooperative_groups.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "core/cuda/launch.h"
#include "cuda_on_cpu.h"
#include "in_order.h"

using cuda_on_cpu::Order;
using fusednn::cuda::dynamic_shared;
using fusednn::cuda::launch;
using fusednn::cuda::launch_cooperative;

namespace {

constexpr unsigned all_lanes = 0xffffffffu;

__global__ void shuffle_rows(int* out) {  // out [8, 32]
  const int t = threadIdx.x;
  out[0 * 32 + t] = __shfl_sync(all_lanes, t, 5);
  out[1 * 32 + t] = __shfl_sync(all_lanes, t, 9, 8);
  out[2 * 32 + t] = __shfl_up_sync(all_lanes, t, 3, 16);
  out[3 * 32 + t] = __shfl_down_sync(all_lanes, t, 3, 16);
  out[4 * 32 + t] = __shfl_xor_sync(all_lanes, t, 6);
  out[5 * 32 + t] = __shfl_xor_sync(all_lanes, t, 8, 8);
  out[6 * 32 + t] = static_cast<int>(__shfl_down_sync(all_lanes, t + 0.25, 1));
  out[7 * 32 + t] = t < 16 ? __shfl_sync(0x0000ffffu, t, 3) : __shfl_sync(0xffff0000u, t, 20);
}

__global__ void votes(unsigned* out) {
  const unsigned t = threadIdx.x;
  const unsigned row[] = {
      __ballot_sync(all_lanes, t % 3 == 0),
      static_cast<unsigned>(__any_sync(all_lanes, t == 7)),
      static_cast<unsigned>(__any_sync(all_lanes, t == 77)),
      static_cast<unsigned>(__all_sync(all_lanes, t < 32)),
      static_cast<unsigned>(__all_sync(all_lanes, t < 31)),
      __activemask(),
      __reduce_add_sync(all_lanes, t),
      static_cast<unsigned>(__reduce_max_sync(all_lanes, static_cast<int>(t) - 40)),
      static_cast<unsigned>(__reduce_min_sync(all_lanes, static_cast<int>(t) - 40)),
      __reduce_xor_sync(all_lanes, t | 64u),
      __match_any_sync(all_lanes, t / 8),
  };
  if (t == 9) std::copy(std::begin(row), std::end(row), out);
}

__global__ void block_votes(int* out) {
  const int t = threadIdx.x;
  const int count = __syncthreads_count(t % 5 == 0);
  const int any = __syncthreads_or(t == 99), none = __syncthreads_or(t == 100);
  const int all = __syncthreads_and(t < 100), most = __syncthreads_and(t < 99);
  if (t == 50) {
    const int row[] = {count, any, none, all, most};
    std::copy(std::begin(row), std::end(row), out);
  }
}

__global__ void indices(int* out) {  // [grid, block]
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = block * 1000 + thread;
}

// Lanes that exit are no longer waited for by __syncwarp.
__global__ void half_leaves(int* out) {
  if (threadIdx.x >= 16) return;
  __syncwarp();
  out[threadIdx.x] = 1;
}

// Each step every block needs what all the others wrote in the step before.
__global__ void diffuse(int* x, int steps) {  // x [2, blocks, threads]
  const auto grid = cooperative_groups::this_grid();
  int* own = dynamic_shared<int>();
  const int n = static_cast<int>(grid.size()), i = static_cast<int>(grid.thread_rank());
  own[threadIdx.x] = i;
  for (int step = 0; step < steps; ++step) {
    const int* from = x + (step % 2) * n;
    int* to = x + (1 - step % 2) * n;
    to[i] = from[(i + static_cast<int>(blockDim.x)) % n] + 1;
    grid.sync();
  }
  if (own[threadIdx.x] != i) __trap();  // shared memory is the block's own across grid syncs
}

// A barrier between blocks as persistent kernels write it themselves: arrive, then spin.
__global__ void own_grid_barrier(unsigned* arrived, int* x, int* out) {
  x[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
  __threadfence();
  atomicAdd(arrived, 1u);
  while (atomicAdd(arrived, 0u) < gridDim.x) {
  }
  __threadfence();
  int sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += x[b];
  out[blockIdx.x] = sum;
}

// The last block to finish sums the others' results.
__global__ void last_block_sums(int* partial, unsigned* done, int* out) {
  partial[blockIdx.x] = static_cast<int>(blockIdx.x);
  __threadfence();
  if (atomicInc(done, gridDim.x - 1) != gridDim.x - 1) return;
  __threadfence();
  for (unsigned b = 0; b < gridDim.x; ++b) *out += partial[b];
}

__global__ void atomics(float* f, double* d, int* i, unsigned* u) {
  const int t = threadIdx.x;
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
  atomicMax(i, t);
  atomicMin(i + 1, -t);
  unsigned seen = atomicAdd(u, 0u), expected;
  do {
    expected = seen;
    seen = atomicCAS(u, expected, expected + 2u);
  } while (seen != expected);
}

__global__ void first_arrivals(int* order, int* count) {
  order[atomicAdd(count, 1)] = threadIdx.x + 100 * blockIdx.x;
}

__global__ void tiles(int* out) {
  const auto tile = cooperative_groups::tiled_partition<8>(cooperative_groups::this_thread_block());
  int value = static_cast<int>(threadIdx.x);
  for (unsigned step = 4; step > 0; step /= 2) value += tile.shfl_xor(value, step);
  tile.sync();
  out[threadIdx.x] = value + 1000 * static_cast<int>(tile.ballot(tile.thread_rank() == 2));
}

__global__ void throws(int) { throw std::runtime_error("planted"); }
__global__ void fills(float* out, float value) {
  float* staged = dynamic_shared<float>();
  if (threadIdx.x == 0) out[1] = staged[0];
  __syncthreads();
  staged[threadIdx.x] = value;
  __syncthreads();
  if (threadIdx.x == 0) out[0] = staged[blockDim.x - 1];
}
__global__ void nothing() {}

template <class T>
bool equal(const T* got, std::initializer_list<T> expected) {
  return std::equal(expected.begin(), expected.end(), got);
}

}  // namespace

TEST(shuffles) {
  std::vector<int> out(8 * 32);
  CHECK(launch(shuffle_rows, 1, 32, 0, nullptr, out.data()) == cudaSuccess);
  for (int t = 0; t < 32; ++t) {
    const int* row = out.data() + t;
    CHECK_EQUAL(row[0 * 32], 5);
    CHECK_EQUAL(row[1 * 32], t / 8 * 8 + 1);
    CHECK_EQUAL(row[2 * 32], t % 16 >= 3 ? t - 3 : t);
    CHECK_EQUAL(row[3 * 32], t % 16 < 13 ? t + 3 : t);
    CHECK_EQUAL(row[4 * 32], t ^ 6);
    CHECK_EQUAL(row[5 * 32], t / 8 % 2 == 1 ? t - 8 : t);
    CHECK_EQUAL(row[6 * 32], t < 31 ? t + 1 : t);
    CHECK_EQUAL(row[7 * 32], t < 16 ? 3 : 20);
  }
}

TEST(warp_votes) {
  unsigned out[11];
  CHECK(launch(votes, 1, 32, 0, nullptr, out) == cudaSuccess);
  CHECK(equal(out, {0x49249249u, 1u, 0u, 1u, 0u, all_lanes, 496u, static_cast<unsigned>(-9),
                    static_cast<unsigned>(-40), 0u, 0x0000ff00u}));
}

TEST(block_votes) {
  int out[5];
  CHECK(launch(block_votes, 1, 100, 0, nullptr, out) == cudaSuccess);
  CHECK(equal(out, {20, 1, 0, 1, 0}));
}

TEST(indices) {
  const dim3 grid(3, 2, 2), block(4, 3, 2);
  std::vector<int> out(12 * 24);
  CHECK(launch(indices, grid, block, 0, nullptr, out.data()) == cudaSuccess);
  for (int i = 0; i < 12 * 24; ++i) CHECK_EQUAL(out[i], i / 24 * 1000 + i % 24);
}

TEST(syncwarp_without_exited_lanes) {
  int out[16] = {};
  for (Order order : {Order::forward, Order::reverse}) {
    const InOrder scope(order);
    CHECK(launch(half_leaves, 1, 24, 0, nullptr, out) == cudaSuccess);
    CHECK_EQUAL(std::accumulate(out, out + 16, 0), 16);
    std::fill(out, out + 16, 0);
  }
}

TEST(grid_sync) {
  constexpr int blocks = 8, threads = 40, steps = 9;
  std::vector<int> x(2 * blocks * threads);
  CHECK(launch_cooperative(diffuse, blocks, threads, threads * sizeof(int), nullptr, x.data(), steps) ==
        cudaSuccess);
  for (int i = 0; i < blocks * threads; ++i) CHECK_EQUAL(x[(steps % 2) * blocks * threads + i], steps);
  CHECK(launch_cooperative(diffuse, blocks + 1, threads, threads * sizeof(int), nullptr, x.data(), steps) ==
        cudaErrorCooperativeLaunchTooLarge);
  CHECK(launch(diffuse, 1, threads, threads * sizeof(int), nullptr, x.data(), steps) ==
        cudaErrorLaunchFailure);
  CHECK(std::strstr(cuda_on_cpu::last_fault(), "grid sync in a launch that is not cooperative") != nullptr);
}

TEST(own_grid_barrier) {
  unsigned arrived = 0;
  int x[4], out[4];
  CHECK(launch_cooperative(own_grid_barrier, 4, 1, 0, nullptr, &arrived, x, out) == cudaSuccess);
  CHECK(equal(out, {10, 10, 10, 10}));
  arrived = 0;
  CHECK(launch(own_grid_barrier, 4, 1, 0, nullptr, &arrived, x, out) == cudaErrorLaunchFailure);
  CHECK(std::strstr(cuda_on_cpu::last_fault(), "blocks of a plain launch run one after another") != nullptr);
}

TEST(last_block) {
  std::vector<int> partial(10);
  unsigned done = 0;
  int out = 0;
  CHECK(launch(last_block_sums, 10, 1, 0, nullptr, partial.data(), &done, &out) == cudaSuccess);
  CHECK_EQUAL(out, 45);
  CHECK_EQUAL(done, 0u);
}

TEST(atomics) {
  float f = 0;
  double d = 0;
  int i[2] = {-1, 1};
  unsigned u = 0;
  CHECK(launch(atomics, 2, 64, 0, nullptr, &f, &d, i, &u) == cudaSuccess);
  CHECK_EQUAL(f, 64.0f);
  CHECK_EQUAL(d, 32.0);
  CHECK(i[0] == 63 && i[1] == -63);
  CHECK_EQUAL(u, 256u);
}

TEST(orders) {
  auto run = [](Order order, uint64_t seed) {
    std::vector<int> arrivals(3 * 4);
    int count = 0;
    const InOrder scope(order, seed);
    CHECK(launch(first_arrivals, 3, 4, 0, nullptr, arrivals.data(), &count) == cudaSuccess);
    return arrivals;
  };
  std::vector<int> forward = run(Order::forward, 0);
  CHECK(equal(forward.data(), {0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203}));
  const std::vector<int> reverse = run(Order::reverse, 0);
  CHECK(equal(reverse.data(), {203, 202, 201, 200, 103, 102, 101, 100, 3, 2, 1, 0}));
  std::vector<int> random = run(Order::random, 1);
  CHECK(random != forward && random != run(Order::random, 2) && random == run(Order::random, 1));
  std::sort(random.begin(), random.end());
  CHECK(random == forward);
}

TEST(tiles) {
  int out[32];
  CHECK(launch(tiles, 1, 32, 0, nullptr, out) == cudaSuccess);
  for (int t = 0; t < 32; ++t) CHECK_EQUAL(out[t], 28 + t / 8 * 64 + 4000);
}

TEST(exceptions_stay_inside) {
  CHECK(launch(throws, 1, 32, 0, nullptr, 0) == cudaErrorLaunchFailure);
  CHECK(std::strcmp(cudaGetErrorString(cudaErrorLaunchFailure),
                    "cuda_on_cpu: exception in a kernel: planted") == 0);
  CHECK(launch(nothing, 1, 32, 0, nullptr) == cudaSuccess);
}

TEST(launch_errors) {
  CHECK(launch(nothing, 0, 32, 0, nullptr) == cudaSuccess);
  CHECK(launch(nothing, 1, 0, 0, nullptr) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, 1, 1025, 0, nullptr) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, dim3(1, 70000), 1, 0, nullptr) == cudaErrorInvalidConfiguration);
  CHECK(launch(nothing, 1, 1, 99 * 1024, nullptr) == cudaSuccess);
  CHECK(launch(nothing, 1, 1, 99 * 1024 + 1, nullptr) == cudaErrorInvalidValue);
}

TEST(dynamic_shared_memory) {
  float out[2];
  CHECK(launch(fills, 1, 100, 100 * sizeof(float), nullptr, out, 3) == cudaSuccess);
  CHECK_EQUAL(out[0], 3.0f);
  CHECK(out[1] != out[1]);  // it starts as NaN
}

TEST(host_threads_take_turns) {
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < 10; ++round) {
        float out[2] = {};
        const bool good =
            launch(fills, 1, 33, 33 * sizeof(float), nullptr, out, i) == cudaSuccess && out[0] == i;
        const bool bad = launch(throws, 1, 2, 0, nullptr, 0) == cudaErrorLaunchFailure;
        if (!good || !bad) ++wrong[i];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int count : wrong) CHECK_EQUAL(count, 0);
}
