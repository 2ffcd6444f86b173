// Run-time choice of the instruction set. Compiled for the baseline only.
#include <atomic>

#include "core/cpu/features.h"

namespace fusednn::cpu {

const char* name(Isa isa) {
  constexpr const char* names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

Isa best_isa() {
#if defined(FUSEDNN_HAVE_X86_ISAS)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

namespace {

std::atomic<Isa>& in_use() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa current_isa() { return in_use(); }

bool set_isa(Isa isa) {
  if (isa > best_isa()) return false;
  in_use() = isa;
  return true;
}

}  // namespace fusednn::cpu
