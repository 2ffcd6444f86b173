// What the kernels of the conv family share: strides of an image, index arithmetic, the epilogue.
#pragma once

#include <cstdint>
#include <type_traits>

#include "conv/activations.h"
#include "core/activation.h"
#include "core/cuda/vector_access.h"

namespace fusednn::cuda {

// Distances in elements. A plane is one channel of one image.
struct ImageStrides {
  int64_t n, row;
  int64_t c, column;

  __host__ __device__ ImageStrides(int64_t channels, int height, int width, bool channels_last) {
    c = channels_last ? 1 : static_cast<int64_t>(height) * width;
    column = channels_last ? channels : 1;
    row = column * width;
    n = channels * height * width;
  }

  __host__ __device__ int64_t offset(int64_t image, int channel, int y, int x) const {
    return image * n + channel * c + y * row + x * column;
  }
};

struct Division {
  int64_t quotient;
  int remainder;
};

// 64-bit division costs a subroutine call; nearly every problem fits 32 bits.
__device__ __forceinline__ Division divide(int64_t a, int b) {
  const int64_t quotient =
      a <= UINT32_MAX ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
  return {quotient, static_cast<int>(a - quotient * b)};
}

struct Division32 {
  unsigned quotient;
  int remainder;
};

__device__ __forceinline__ Division32 divide(unsigned a, int b) {
  const unsigned quotient = a / static_cast<unsigned>(b);
  return {quotient, static_cast<int>(a - quotient * b)};
}

struct ImagePlace {
  int64_t image;
  int c, y, x;
};

// Where the `item`-th pack of V channels of an image lies, counted in the order of memory.
template <int V>
__device__ __forceinline__ ImagePlace image_place(int64_t item, int channels, int height, int width,
                                                  bool channels_last) {
  if (channels_last) {
    const auto [position, pack] = divide(item, channels / V);
    const auto [row, x] = divide(position, width);
    const auto [image, y] = divide(row, height);
    return {image, pack * V, y, x};
  }
  const auto [row, x] = divide(item, width);
  const auto [plane, y] = divide(row, height);
  const auto [image, c] = divide(plane, channels);
  return {image, c, y, x};
}

template <class A>
__host__ __device__ constexpr A ceil_divide(A a, A b) {
  return (a + b - 1) / b;
}

__device__ __forceinline__ bool inside(int i, int size) {
  return static_cast<unsigned>(i) < static_cast<unsigned>(size);
}

// Calls apply(constant) with the activation as a compile-time constant: one branch for many elements.
template <class Apply>
__device__ __forceinline__ void by_activation(Activation activation, Apply&& apply) {
  switch (activation) {
    case Activation::none:
      return apply(std::integral_constant<Activation, Activation::none>{});
    case Activation::relu:
      return apply(std::integral_constant<Activation, Activation::relu>{});
    case Activation::relu6:
      return apply(std::integral_constant<Activation, Activation::relu6>{});
    case Activation::silu:
      return apply(std::integral_constant<Activation, Activation::silu>{});
    case Activation::hardswish:
      return apply(std::integral_constant<Activation, Activation::hardswish>{});
    case Activation::gelu:
      return apply(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return apply(std::integral_constant<Activation, Activation::gelu_tanh>{});
  }
}

template <class A, int N>
__device__ __forceinline__ void activate(Activation activation, A (&z)[N]) {
  by_activation(activation, [&](auto constant) {
#pragma unroll
    for (int j = 0; j < N; ++j) z[j] = math::activated(decltype(constant)::value, z[j]);
  });
}

// z becomes the gradient of z, given that of the activated z.
template <class A, int N>
__device__ __forceinline__ void activate_backward(Activation activation, const A (&grad)[N], A (&z)[N]) {
  by_activation(activation, [&](auto constant) {
#pragma unroll
    for (int j = 0; j < N; ++j) z[j] = math::activation_gradient(decltype(constant)::value, grad[j], z[j]);
  });
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

}  // namespace fusednn::cuda
