// The extension module fusednn._C.
#include <pybind11/pybind11.h>

#include <string>

#include "core/bindings/bindings.h"
#include "core/cpu/features.h"

namespace {

using fusednn::cpu::Isa;

std::string current_isa() { return fusednn::cpu::name(fusednn::cpu::current_isa()); }
std::string best_isa() { return fusednn::cpu::name(fusednn::cpu::best_isa()); }

void set_isa(const std::string& wanted) {
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (wanted != fusednn::cpu::name(isa)) continue;
    if (!fusednn::cpu::set_isa(isa))
      throw pybind11::value_error("isa: got " + wanted + ", expected at most " + best_isa() +
                                  " on this machine");
    return;
  }
  throw pybind11::value_error("isa: got " + wanted + ", expected baseline, avx2 or avx512");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fusednn; used through torch.ops.fusednn.";
  pybind11::module_ cpu = m.def_submodule("cpu", "Kernels for CPU tensors.");
  cpu.def("isa", &current_isa, "Instruction set in use.");
  cpu.def("best_isa", &best_isa, "Best instruction set of this machine and binary.");
  cpu.def("set_isa", &set_isa, "Cap the instruction set.");
  fusednn::bind_rnn_cpu(cpu);
  fusednn::bind_conv_cpu(cpu);
  fusednn::bind_conv_depthwise_cpu(cpu);
  fusednn::bind_conv_train_cpu(cpu);
  fusednn::bind_conv_cpu_eager(cpu);
  fusednn::bind_spatial_cpu(cpu);
  fusednn::bind_spatial_cpu_eager(cpu);
  fusednn::bind_attention_cpu(cpu);
  fusednn::bind_attention_cpu_eager(cpu);
  fusednn::bind_attention_lstm_cpu(cpu);
  fusednn::bind_projection_cpu(cpu);
#if defined(FUSEDNN_WITH_CUDA)
  pybind11::module_ cuda = m.def_submodule("cuda", "Kernels for CUDA tensors.");
  fusednn::bind_rnn_cuda(cuda, &fusednn::current_cuda_stream);
  fusednn::bind_conv_cuda(cuda, &fusednn::current_cuda_stream);
  fusednn::bind_spatial_cuda(cuda, &fusednn::current_cuda_stream);
  fusednn::bind_attention_cuda(cuda, &fusednn::current_cuda_stream);
  fusednn::bind_attention_lstm_cuda(cuda, &fusednn::current_cuda_stream);
#endif
}
