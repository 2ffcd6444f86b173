// Stand-in for the toolkit's header: CUDA C++ as plain C++.
#pragma once

#include <math.h>

#include "cuda_on_cpu/core.h"
#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// One copy per declaration serves plain launches, whose blocks run one after another; the note lets the
// scheduler refuse the others.
#define __shared__                                         \
  ::cuda_on_cpu::note_static_shared({__FILE__, __LINE__}); \
  static

#include "cuda_on_cpu/atomics.h"
#include "cuda_on_cpu/launch.h"
#include "cuda_on_cpu/math.h"
#include "cuda_on_cpu/memory.h"
#include "cuda_on_cpu/warp.h"
