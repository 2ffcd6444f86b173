// What the kernels of the conv family share: strides of an image, index arithmetic, the epilogue, the choice of a
// kernel's size.
#pragma once

#include <cstdint>

#include "conv/activations.h"
#include "conv/cuda/params.h"
#include "core/activation.h"
#include "core/cuda/dtypes.h"
#include "core/cuda/index.h"
#include "core/cuda/launch.h"
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

template <class I>
struct Division {
  I quotient;
  int remainder;
};

// 64-bit division costs a subroutine call; nearly every problem fits 32 bits.
__device__ __forceinline__ Division<int64_t> divide(int64_t a, int b) {
  const int64_t quotient =
      a <= UINT32_MAX ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
  return {quotient, static_cast<int>(a - quotient * b)};
}

__device__ __forceinline__ Division<unsigned> divide(unsigned a, int b) {
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

__device__ __forceinline__ bool inside(int i, int size) {
  return static_cast<unsigned>(i) < static_cast<unsigned>(size);
}

// Calls known<K, S>() for a square kernel of 3, 5 or 7 with stride 1 or 2, undilated; any() for the others.
template <class Known, class Any>
cudaError_t by_kernel_size(const DepthwiseShape& s, Known&& known, Any&& any) {
  const bool regular = s.kernel_h == s.kernel_w && s.stride_h == s.stride_w && s.stride_h <= 2 &&
                       s.dilation_h == 1 && s.dilation_w == 1;
  const auto by_stride = [&]<int K>() {
    return s.stride_h == 1 ? known.template operator()<K, 1>() : known.template operator()<K, 2>();
  };
  if (regular && s.kernel_h == 3) return by_stride.template operator()<3>();
  if (regular && s.kernel_h == 5) return by_stride.template operator()<5>();
  if (regular && s.kernel_h == 7) return by_stride.template operator()<7>();
  return any();
}

template <class A, int N>
__device__ __forceinline__ void activate(Activation activation, A (&z)[N]) {
  with_activation(activation, [&]<Activation F>() {
#pragma unroll
    for (int j = 0; j < N; ++j) z[j] = math::activated(F, z[j]);
  });
}

// z becomes the gradient of z, given that of the activated z.
template <class A, int N>
__device__ __forceinline__ void activate_backward(Activation activation, const A (&grad)[N], A (&z)[N]) {
  with_activation(activation, [&]<Activation F>() {
#pragma unroll
    for (int j = 0; j < N; ++j) z[j] = math::activation_gradient(F, grad[j], z[j]);
  });
}

}  // namespace fusednn::cuda
