// What the stand-in headers ask of the scheduler. Everything behind these declarations is compiled without
// instrumentation, so a sanitizer sees a kernel's own accesses and nothing of the machinery.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_on_cpu/vector_types.h"

namespace cuda_on_cpu {

// Where in a kernel a thread waits.
struct Site {
  const char* file;
  int line;
};

// Default arguments that name the caller's line. (Inside a Site's braces GCC would name the callee's.)
#define CUDA_ON_CPU_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

constexpr unsigned full_mask = 0xffffffffu;
constexpr size_t max_payload = 256;  // bytes that one lane brings to a collective

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes;
  bool cooperative;
};

// 0 or a cudaError_t. `body(context)` is one CUDA thread.
int launch(const LaunchShape& shape, const void* kernel, void (*body)(void*), void* context);

void* dynamic_shared_memory();
void note_static_shared(Site site);
// A fault if `address` lies in the block's dynamic shared memory, where `name` would fault on a device.
void expect_global(const char* name, const void* address, Site site);

// Waits for every thread of the block; returns in how many of them `predicate` held.
int sync_block(const char* name, bool predicate, Site site);
void sync_grid(Site site);
// Waits for the lanes of `mask` that have not exited, and orders their memory accesses.
void sync_warp(unsigned mask, Site site);
// Waits for all lanes of `mask`; gathers `bytes` (a multiple of 8, at most max_payload) from lane i at
// all + i * bytes. Orders no memory accesses: CUDA's collectives don't.
void exchange(const char* name, unsigned mask, const void* mine, void* all, size_t bytes, Site site);

unsigned lane();
unsigned live_lanes();
// The thread lets others run. A grid in which this is all that happens, without progress, is a fault.
void yield(bool progress);
// Orders this thread's accesses with those around other threads' fences.
void fence();
[[noreturn]] void fail(const char* message);

}  // namespace cuda_on_cpu

// The scheduler writes these at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;
