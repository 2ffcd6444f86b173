// The one way in which kernels are launched and dynamic shared memory is named.
//
// It uses nothing but cudaLaunchKernelEx, which csrc/tests/cuda_on_cpu also provides: the same source then
// runs on the CPU in tests. For that to work a kernel
//   - declares static shared memory as a statement of its own: `__shared__ float tile[32][33];`
//     (alignment after the word: `__shared__ __align__(16) float tile[64];`)
//   - takes dynamic shared memory from dynamic_shared<T>(), never from `extern __shared__`;
//   - uses only dynamic shared memory if it is launched by launch_cooperative on more than one block;
//   - holds no inline PTX outside `#if defined(__CUDA_ARCH__)`, which the CPU does not define.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace fusednn::cuda {

// The block's dynamic shared memory, 16-byte aligned; its contents are undefined at entry.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(FUSEDNN_CUDA_ON_CPU)
  return static_cast<T*>(::cuda_on_cpu::dynamic_shared_memory());
#else
  extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
#endif
}

namespace detail {

// Opts in to the device's whole limit, not to `shared_bytes`: two host threads then can't lower each other's.
template <class... Params>
cudaError_t allow_dynamic_shared(void (*kernel)(Params...), size_t shared_bytes) {
  if (shared_bytes == 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  if (shared_bytes <= static_cast<size_t>(attributes.maxDynamicSharedSizeBytes)) return cudaSuccess;
  int device = 0, limit = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const int dynamic_limit = limit - static_cast<int>(attributes.sharedSizeBytes);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic_limit);
}

template <class... Params, class... Args>
cudaError_t launch(bool cooperative, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  cudaError_t error = allow_dynamic_shared(kernel, shared_bytes);
  if (error == cudaSuccess) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cooperative ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...);
  }
  // A refused launch also stays behind as the runtime's last error, where the next caller would find it.
  const cudaError_t last = cudaGetLastError();
  return error != cudaSuccess ? error : last;
}

}  // namespace detail

// Arguments are converted to the kernel's parameter types. A grid without blocks is an empty input: success.
// More than 48 KiB of shared memory is asked for when `shared_bytes` needs it.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Args&&... args) {
  return detail::launch(false, kernel, grid, block, shared_bytes, stream, static_cast<Args&&>(args)...);
}

// All blocks are resident at once, so the kernel may call cooperative_groups::this_grid().sync().
// A grid that does not fit returns cudaErrorCooperativeLaunchTooLarge: size it by
// cudaOccupancyMaxActiveBlocksPerMultiprocessor.
template <class... Params, class... Args>
cudaError_t launch_cooperative(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                               cudaStream_t stream, Args&&... args) {
  return detail::launch(true, kernel, grid, block, shared_bytes, stream, static_cast<Args&&>(args)...);
}

}  // namespace fusednn::cuda
