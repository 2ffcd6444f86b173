// What each family adds to the extension module. No CUDA header here: machines without CUDA build the rest.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

struct CUstream_st;

namespace fusednn {

// The stream on which the kernels of a tensor's device are launched; chosen by the module that binds.
using StreamOf = CUstream_st* (*)(const at::Tensor&);

CUstream_st* current_cuda_stream(const at::Tensor& tensor);

void bind_rnn_cpu(pybind11::module_& m);
void bind_conv_cpu(pybind11::module_& m);
void bind_conv_depthwise_cpu(pybind11::module_& m);
void bind_conv_train_cpu(pybind11::module_& m);
void bind_conv_cpu_eager(pybind11::module_& m);
void bind_spatial_cpu(pybind11::module_& m);
void bind_spatial_cpu_eager(pybind11::module_& m);
void bind_attention_cpu(pybind11::module_& m);
void bind_attention_cpu_eager(pybind11::module_& m);
void bind_attention_lstm_cpu(pybind11::module_& m);
void bind_projection_cpu(pybind11::module_& m);
void bind_rnn_cuda(pybind11::module_& m, StreamOf stream_of);
void bind_conv_cuda(pybind11::module_& m, StreamOf stream_of);
void bind_spatial_cuda(pybind11::module_& m, StreamOf stream_of);
void bind_attention_cuda(pybind11::module_& m, StreamOf stream_of);
void bind_attention_lstm_cuda(pybind11::module_& m, StreamOf stream_of);

}  // namespace fusednn
