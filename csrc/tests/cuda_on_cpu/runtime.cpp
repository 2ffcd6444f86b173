// The host side: errors, device attributes, memory.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "cuda_runtime_api.h"
#include "scheduler.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t default_dynamic_limit = 48 * 1024;

thread_local std::string fault;

struct Limits {
  std::mutex mutex;
  std::map<const void*, size_t> of_kernel;
};

Limits& limits() {
  static Limits value;
  return value;
}

}  // namespace

Device& device() {
  static Device value;
  return value;
}

const char* last_fault() { return fault.c_str(); }

void keep_fault(const std::string& message) { fault = "cuda_on_cpu: " + message; }

size_t dynamic_shared_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(limits().mutex);
  const auto found = limits().of_kernel.find(kernel);
  return found == limits().of_kernel.end() ? default_dynamic_limit : found->second;
}

}  // namespace cuda_on_cpu

// Errors are returned, never kept: nothing here is asynchronous.
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
  }
  return "unknown error";
}

const char* cudaGetErrorString(cudaError_t error) {
  const char* fault = cuda_on_cpu::last_fault();
  return error == cudaErrorLaunchFailure && *fault != '\0' ? fault : cudaGetErrorName(error);
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  const cuda_on_cpu::Device& on = cuda_on_cpu::device();
  const int optin = static_cast<int>(on.shared_memory_per_block_optin);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = 32;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = on.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 1024 * on.blocks_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = on.compute_capability_major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = on.compute_capability_minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = optin + 1024;
      return cudaSuccess;
    case cudaDevAttrCooperativeLaunch:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = optin;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (posix_memalign(pointer, 256, bytes) != 0) return cudaErrorMemoryAllocation;
  memset(*pointer, 0xff, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  if (bytes > 0) memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(to, value, bytes);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  attributes->sharedSizeBytes = 0;
  attributes->maxThreadsPerBlock = 1024;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(cuda_on_cpu::dynamic_shared_limit(kernel));
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > cuda_on_cpu::device().shared_memory_per_block_optin) {
    return cudaErrorInvalidValue;
  }
  auto& limits = cuda_on_cpu::limits();
  const std::lock_guard<std::mutex> lock(limits.mutex);
  limits.of_kernel[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int block_size,
                                                          size_t shared_bytes) {
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  const bool fits =
      block_size > 0 && block_size <= 1024 && shared_bytes <= cuda_on_cpu::dynamic_shared_limit(kernel);
  *blocks = fits ? cuda_on_cpu::device().blocks_per_multiprocessor : 0;
  return cudaSuccess;
}
