// Loads and stores with a choice of caching: of global memory alone.
#pragma once

#include <type_traits>

#include "cuda_on_cpu/core.h"

#define CUDA_ON_CPU_LOAD(name)                                \
  template <class T>                                          \
  T name(const T* address, CUDA_ON_CPU_CALLER) {              \
    cuda_on_cpu::expect_global(#name, address, {file, line}); \
    return *address;                                          \
  }
CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldca)
CUDA_ON_CPU_LOAD(__ldcg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_LOAD(__ldcv)
CUDA_ON_CPU_LOAD(__ldlu)
#undef CUDA_ON_CPU_LOAD

#define CUDA_ON_CPU_STORE(name)                                              \
  template <class T>                                                         \
  void name(T* address, std::type_identity_t<T> value, CUDA_ON_CPU_CALLER) { \
    cuda_on_cpu::expect_global(#name, address, {file, line});                \
    *address = value;                                                        \
  }
CUDA_ON_CPU_STORE(__stcg)
CUDA_ON_CPU_STORE(__stcs)
CUDA_ON_CPU_STORE(__stwb)
CUDA_ON_CPU_STORE(__stwt)
#undef CUDA_ON_CPU_STORE
