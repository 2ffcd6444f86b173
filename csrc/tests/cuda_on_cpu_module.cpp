// The CUDA bindings on CPU tensors: what the tests import as _cuda_on_cpu. Its "stream" is the only one there
// is.
#include "core/bindings/bindings.h"

namespace {

CUstream_st* only_stream(const at::Tensor&) { return nullptr; }

}  // namespace

PYBIND11_MODULE(_cuda_on_cpu, m) {
  m.doc() = "CUDA kernels of fusednn, executed on the CPU for tests.";
  fusednn::bind_rnn_cuda(m, &only_stream);
  fusednn::bind_conv_cuda(m, &only_stream);
  fusednn::bind_spatial_cuda(m, &only_stream);
  fusednn::bind_attention_cuda(m, &only_stream);
  fusednn::bind_attention_lstm_cuda(m, &only_stream);
}
