// CUDA kernels executed on the CPU, for tests only: settings and the last fault.
//
// A .cu file compiled as C++ with csrc/tests/cuda_on_cpu/include first on the include path finds stand-ins
// for the toolkit's headers there. A launch runs every CUDA thread as a fiber of the calling host thread; a
// fiber gives way only at barriers, warp collectives, atomics, fences and __nanosleep.
// docs/design/003-cuda-on-cpu.md says what this catches.
//
// Supported   barriers and votes, warp collectives, atomics, fences, cooperative_groups (block, tiles, grid),
//             static and dynamic shared memory, vector types, __half, __nv_bfloat16, nvcuda::wmma.
// Reported    as cudaErrorLaunchFailure with the text of last_fault(): a barrier or collective that some of
// its
//             threads never reach, or reach at another place; a collective whose mask names a missing lane; a
//             spin loop (over atomics, fences or __nanosleep) in which no thread advances; an exception;
//             static __shared__ in a cooperative launch of several blocks, whose copies would be one.
// Not seen    a spin loop over volatile loads alone (it hangs); reads of uninitialised static __shared__;
//             __launch_bounds__; timing, occupancy, memory ordering weaker than the fences state.
//
// Plain launches run block after block, so static __shared__ needs one copy. Launches from several host
// threads take turns. A launch from inside a kernel returns cudaErrorNotSupported.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_cpu {

// The order in which the ready threads of a block, and the blocks of a grid, take their turns.
// `random` draws a new permutation for every turn. Results must not depend on it.
enum class Order { forward, reverse, random };

struct Schedule {
  Order order = Order::forward;
  uint64_t seed = 0;  // moves on with every draw
};

// Starts as the environment variable CUDA_ON_CPU_ORDER says: forward | reverse | random | random:<seed>.
// Not to be changed while a launch runs; nor is the device.
Schedule& schedule();

// The emulated device. Small, so that persistent kernels stay cheap; 99 KiB is the least opt-in limit of the
// architectures that the product targets.
struct Device {
  int multiprocessors = 4;
  int blocks_per_multiprocessor = 2;
  size_t shared_memory_per_block_optin = 99 * 1024;
  int compute_capability_major = 8;
  int compute_capability_minor = 6;
};

Device& device();

// What went wrong in this host thread's last failed launch; empty if nothing has. cudaGetErrorString returns
// it too for cudaErrorLaunchFailure.
const char* last_fault();

}  // namespace cuda_on_cpu
