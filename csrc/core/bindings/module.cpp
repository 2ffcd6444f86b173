// The extension module fusednn._C.
#include <string>

#include "core/bindings/registry.h"
#include "core/cpu/features.h"

namespace fusednn {
namespace {

using cpu::Isa;

void set_isa(const std::string& wanted) {
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (wanted != cpu::name(isa)) continue;
    if (!cpu::set_isa(isa))
      throw pybind11::value_error("isa: got " + wanted + ", expected at most " + cpu::name(cpu::best_isa()) +
                                  " on this machine");
    return;
  }
  throw pybind11::value_error("isa: got " + wanted + ", expected baseline, avx2 or avx512");
}

}  // namespace

FUSEDNN_BINDINGS(cpu) {
  m.def("isa", [] { return cpu::name(cpu::current_isa()); }, "Instruction set in use.");
  m.def(
      "best_isa", [] { return cpu::name(cpu::best_isa()); },
      "Best instruction set of this machine and binary.");
  m.def("set_isa", &set_isa, "Cap the instruction set.");
}

}  // namespace fusednn

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of fusednn; used through torch.ops.fusednn.";
  fusednn::Bindings::fill_submodule(m, "cpu", "Kernels for CPU tensors.");
  fusednn::Bindings::fill_submodule(m, "cuda", "Kernels for CUDA tensors.");
}
