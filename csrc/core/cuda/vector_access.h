// Packs of consecutive elements: one load or store of 2 to 16 bytes, arithmetic in float (double for double).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fusednn::cuda {

constexpr int kWidestAccess = 16;  // bytes

template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T narrow(Arithmetic<T> x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  static_assert(sizeof(T) * N <= kWidestAccess);
  T items[N];

  __device__ Arithmetic<T> get(int i) const { return widen(items[i]); }
  __device__ void set(int i, Arithmetic<T> x) { items[i] = narrow<T>(x); }
};

// The built-in vector type of a pack's size.
template <class T, int N, int bytes = sizeof(Pack<T, N>)>
using RawPack = std::conditional_t<
    bytes == 2, unsigned short,
    std::conditional_t<bytes == 4, unsigned int, std::conditional_t<bytes == 8, uint2, uint4>>>;

template <class T, int N>
__device__ inline Pack<T, N> from_raw(const RawPack<T, N>& raw) {
  Pack<T, N> pack;
  memcpy(&pack, &raw, sizeof(pack));
  return pack;
}

template <class T, int N>
__device__ inline RawPack<T, N> to_raw(const Pack<T, N>& pack) {
  RawPack<T, N> raw;
  memcpy(&raw, &pack, sizeof(pack));
  return raw;
}

// In global memory. A plain access through a vector type may be taken apart into scalar ones; the intrinsics,
// with the default caching, may not. `offset` counts elements; data + offset must be aligned to the pack.
template <class T, int N>
__device__ inline Pack<T, N> load(const void* data, int64_t offset) {
  return from_raw<T, N>(__ldca(reinterpret_cast<const RawPack<T, N>*>(static_cast<const T*>(data) + offset)));
}

template <class T, int N>
__device__ inline Pack<T, N> load_or_zero(const void* data, int64_t offset) {
  if (data != nullptr) return load<T, N>(data, offset);
  Pack<T, N> zero;
#pragma unroll
  for (int i = 0; i < N; ++i) zero.set(i, 0);
  return zero;
}

template <class T, int N>
__device__ inline void store(void* data, int64_t offset, const Pack<T, N>& pack) {
  __stwb(reinterpret_cast<RawPack<T, N>*>(static_cast<T*>(data) + offset), to_raw(pack));
}

// N neighbours, as one aligned pack or the first `count` of them one by one; the others become 0.
template <class T, int N>
__device__ __forceinline__ void load_values(const void* data, int64_t offset, bool packed, int count,
                                            Arithmetic<T> (&values)[N]) {
  if (packed) {
    const Pack<T, N> pack = load<T, N>(data, offset);
#pragma unroll
    for (int j = 0; j < N; ++j) values[j] = pack.get(j);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      values[j] = j < count ? widen(static_cast<const T*>(data)[offset + j]) : Arithmetic<T>(0);
    }
  }
}

template <class T, int N>
__device__ __forceinline__ void store_values(void* data, int64_t offset, bool packed, int count,
                                             const Arithmetic<T> (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) pack.set(j, values[j]);
  if (packed) {
    store(data, offset, pack);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j < count) static_cast<T*>(data)[offset + j] = pack.items[j];
    }
  }
}

// Packs in shared memory, on which those intrinsics fault.
template <class T, int N>
__device__ inline Pack<T, N> load_shared(const T* data, int offset) {
  return from_raw<T, N>(*reinterpret_cast<const RawPack<T, N>*>(data + offset));
}

template <class T, int N>
__device__ inline void store_shared(T* data, int offset, const Pack<T, N>& pack) {
  *reinterpret_cast<RawPack<T, N>*>(data + offset) = to_raw(pack);
}

}  // namespace fusednn::cuda
