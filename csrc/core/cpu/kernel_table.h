// A family's kernels of one instruction set are a table of function pointers. The file that holds the kernels
// defines it:
//   FUSEDNN_KERNELS(RnnKernels) = {pack_weights, ...};     inside fusednn::cpu::FUSEDNN_ISA
// and who calls them asks for that of current_isa():
//   cpu::kernels<cpu::RnnKernels>().pack_weights(...)
#pragma once

#include "core/cpu/features.h"

namespace fusednn::cpu {

#define FUSEDNN_DECLARE_TABLE(isa) \
  namespace isa {                  \
  template <class Kernels>         \
  struct Table {                   \
    static const Kernels value;    \
  };                               \
  }
FUSEDNN_DECLARE_TABLE(baseline)
FUSEDNN_DECLARE_TABLE(avx2)
FUSEDNN_DECLARE_TABLE(avx512)
#undef FUSEDNN_DECLARE_TABLE

#define FUSEDNN_KERNELS(Kernels) \
  template <>                    \
  const Kernels Table<Kernels>::value

template <class Kernels>
const Kernels& kernels() {
#if defined(FUSEDNN_HAVE_X86_ISAS)
  if (current_isa() == Isa::avx512) return avx512::Table<Kernels>::value;
  if (current_isa() == Isa::avx2) return avx2::Table<Kernels>::value;
#endif
  return baseline::Table<Kernels>::value;
}

}  // namespace fusednn::cpu
