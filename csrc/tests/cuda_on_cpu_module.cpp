// The CUDA bindings on CPU tensors: what the tests import as _cuda_on_cpu. Its "stream" is the only one there
// is.
#include "core/bindings/cuda_arguments.h"
#include "core/bindings/registry.h"

CUstream_st* fusednn::current_stream(const at::Tensor&) { return nullptr; }

PYBIND11_MODULE(_cuda_on_cpu, m) {
  m.doc() = "CUDA kernels of fusednn, executed on the CPU for tests.";
  fusednn::Bindings::fill(m, "cuda");
}
