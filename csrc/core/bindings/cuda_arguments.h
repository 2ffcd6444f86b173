// What the CUDA bindings ask of a call: a stream, and launches that succeed.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <cuda_runtime_api.h>

#include "core/bindings/tensor_checks.h"

struct CUstream_st;

namespace fusednn {

// The stream on which kernels for `tensor` are launched; whoever links the bindings defines it.
CUstream_st* current_stream(const at::Tensor& tensor);

inline void launched(const CheckedArguments& call, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, call.op(), ": CUDA error: ", cudaGetErrorString(error));
}

}  // namespace fusednn
