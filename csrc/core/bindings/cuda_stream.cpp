// The product's stream: PyTorch's current one on the tensor's device.
#include <c10/cuda/CUDAStream.h>

#include "core/bindings/cuda_arguments.h"

CUstream_st* fusednn::current_stream(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_cuda(), "the cuda kernels: got tensors on ", tensor.device(),
              ", expected a CUDA device");
  return at::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
}
