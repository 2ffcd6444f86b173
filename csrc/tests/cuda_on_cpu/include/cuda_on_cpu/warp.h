// Barriers and warp collectives. Every collective gathers the lanes' values and works on its own copy.
#pragma once

#include <bit>
#include <cstring>
#include <type_traits>

#include "cuda_on_cpu/core.h"

namespace cuda_on_cpu {

// A value of up to eight bytes from each lane.
template <class T>
struct Gathered {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t words[32];

  Gathered(const char* name, unsigned mask, const T& mine, Site site) {
    uint64_t word = 0;
    std::memcpy(&word, &mine, sizeof(T));
    exchange(name, mask, &word, words, sizeof(word), site);
  }
  T operator[](unsigned lane) const {
    T value;
    std::memcpy(&value, &words[lane], sizeof(T));
    return value;
  }
};

// `source` is the lane within the segment of `width` lanes; outside of it a lane keeps its own value.
template <class T>
T shuffle(const char* name, unsigned mask, const T& value, int source, int width, Site site) {
  if (width < 1 || width > warpSize || !std::has_single_bit(static_cast<unsigned>(width))) {
    fail("shuffle: got a width that is not a power of two up to 32");
  }
  const Gathered<T> lanes(name, mask, value, site);
  const int own = static_cast<int>(lane());
  const int from = source >= 0 && source < width ? own / width * width + source : own;
  if (((mask >> from) & 1u) == 0) fail("shuffle: a lane reads from a lane that its mask does not name");
  return lanes[static_cast<unsigned>(from)];
}

template <class T, class Operation>
T reduce(const char* name, unsigned mask, T value, Operation operation, Site site) {
  const Gathered<T> lanes(name, mask, value, site);
  unsigned rest = mask;
  T result = lanes[static_cast<unsigned>(std::countr_zero(rest))];
  for (rest &= rest - 1; rest != 0; rest &= rest - 1) {
    result = operation(result, lanes[static_cast<unsigned>(std::countr_zero(rest))]);
  }
  return result;
}

inline unsigned ballot(const char* name, unsigned mask, bool predicate, Site site) {
  const Gathered<int> lanes(name, mask, predicate ? 1 : 0, site);
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (((mask >> i) & 1u) != 0 && lanes[i] != 0) result |= 1u << i;
  }
  return result;
}

}  // namespace cuda_on_cpu

inline void __syncthreads(CUDA_ON_CPU_CALLER) {
  cuda_on_cpu::sync_block("__syncthreads", false, {file, line});
}
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_CALLER) {
  return cuda_on_cpu::sync_block("__syncthreads_count", predicate != 0, {file, line});
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_CALLER) {
  return cuda_on_cpu::sync_block("__syncthreads_or", predicate != 0, {file, line}) != 0;
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_CALLER) {
  return cuda_on_cpu::sync_block("__syncthreads_and", predicate == 0, {file, line}) == 0;
}
inline void __syncwarp(unsigned mask = cuda_on_cpu::full_mask, CUDA_ON_CPU_CALLER) {
  cuda_on_cpu::sync_warp(mask, {file, line});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, CUDA_ON_CPU_CALLER) {
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, source & (width - 1), width, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_ON_CPU_CALLER) {
  const int source = (static_cast<int>(cuda_on_cpu::lane()) & (width - 1)) - static_cast<int>(delta);
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, source, width, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_ON_CPU_CALLER) {
  const int source = (static_cast<int>(cuda_on_cpu::lane()) & (width - 1)) + static_cast<int>(delta);
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, source, width, {file, line});
}
// A lane may read from an earlier segment but not from a later one.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, CUDA_ON_CPU_CALLER) {
  const int own = static_cast<int>(cuda_on_cpu::lane());
  const int from = own ^ lane_mask;
  const int end = own / width * width + width;
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, from < end ? from : own, warpSize,
                              {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_CALLER) {
  return cuda_on_cpu::ballot("__ballot_sync", mask, predicate != 0, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_CALLER) {
  return cuda_on_cpu::ballot("__any_sync", mask, predicate != 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_CALLER) {
  return cuda_on_cpu::ballot("__all_sync", mask, predicate != 0, {file, line}) == mask;
}
// The lanes that have not exited: right in converged code only, and reported as a fault elsewhere once used.
inline unsigned __activemask() { return cuda_on_cpu::live_lanes(); }

template <class T>
unsigned __match_any_sync(unsigned mask, T value, CUDA_ON_CPU_CALLER) {
  const cuda_on_cpu::Gathered<T> lanes("__match_any_sync", mask, value, {file, line});
  unsigned result = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (((mask >> i) & 1u) != 0 && lanes[i] == value) result |= 1u << i;
  }
  return result;
}

#define CUDA_ON_CPU_REDUCE(name, T, expression)                                                 \
  inline T name(unsigned mask, T value, CUDA_ON_CPU_CALLER) {                                   \
    return cuda_on_cpu::reduce<T>(#name, mask, value, [](T a, T b) -> T { return expression; }, \
                                  {file, line});                                                \
  }
CUDA_ON_CPU_REDUCE(__reduce_add_sync, unsigned, a + b)
CUDA_ON_CPU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
CUDA_ON_CPU_REDUCE(__reduce_and_sync, unsigned, a& b)
CUDA_ON_CPU_REDUCE(__reduce_or_sync, unsigned, a | b)
CUDA_ON_CPU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
CUDA_ON_CPU_REDUCE(__reduce_add_sync, int,
                   static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
CUDA_ON_CPU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
CUDA_ON_CPU_REDUCE(__reduce_max_sync, int, a < b ? b : a)
#undef CUDA_ON_CPU_REDUCE
