// What the CUDA bindings ask of a call: other tensors as its first one, launches that succeed.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <cuda_runtime_api.h>

#include "core/bindings/tensor_checks.h"

struct CUstream_st;

namespace fusednn {

// The stream on which kernels for `tensor` are launched; whoever links the bindings defines it.
CUstream_st* current_stream(const at::Tensor& tensor);

// Checks the arguments of one call against its first, which sets dtype and device.
class CudaArguments {
 public:
  CudaArguments(const char* op, const char* name, const at::Tensor& first)
      : op_(op),
        first_name_(name),
        options_(strided(name, first).options()),
        dtype_(dtype_of(first, c10::str(op, ": ", name).c_str())) {}

  const char* op() const { return op_; }
  DType dtype() const { return dtype_; }
  const at::TensorOptions& options() const { return options_; }

  // `t` without holes, in this memory format.
  at::Tensor dense(const char* name, const at::Tensor& t, at::IntArrayRef shape,
                   at::MemoryFormat format = at::MemoryFormat::Contiguous) const {
    TORCH_CHECK(strided(name, t).sizes() == shape, op_, ": ", name, ": got shape ", t.sizes(), ", expected ",
                shape);
    TORCH_CHECK(t.dtype() == options_.dtype(), op_, ": ", name, ": got dtype ", t.scalar_type(),
                ", expected ", options_.dtype(), " as ", first_name_);
    TORCH_CHECK(t.device() == options_.device(), op_, ": ", name, ": got a tensor on ", t.device(),
                ", expected ", options_.device(), " as ", first_name_);
    return t.contiguous(format);
  }

  OptionalTensor dense(const char* name, const OptionalTensor& t, at::IntArrayRef shape,
                       at::MemoryFormat format = at::MemoryFormat::Contiguous) const {
    return t ? OptionalTensor(dense(name, *t, shape, format)) : std::nullopt;
  }

  void succeeded(cudaError_t error) const {
    TORCH_CHECK(error == cudaSuccess, op_, ": CUDA error: ", cudaGetErrorString(error));
  }

 private:
  const at::Tensor& strided(const char* name, const at::Tensor& t) const {
    TORCH_CHECK(t.defined() && t.layout() == at::kStrided, op_, ": ", name, ": expected a strided tensor");
    return t;
  }

  const char* op_;
  const char* first_name_;
  at::TensorOptions options_;
  DType dtype_;
};

}  // namespace fusednn
