// Which instruction set the CPU kernels run on.
#pragma once

namespace fusednn::cpu {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };

// The best set that both this binary and this machine have.
Isa best_isa();

// The set in use: best_isa() until set_isa caps it.
Isa current_isa();

// Cap the set; returns false, and changes nothing, if this machine or binary lacks it.
bool set_isa(Isa isa);

const char* name(Isa isa);

}  // namespace fusednn::cpu
