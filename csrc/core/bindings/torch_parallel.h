// torch's OpenMP threads for the kernels: torch.set_num_threads holds, and there is no second pool.
#pragma once

#include "core/parallel.h"

namespace fusednn {

// One thread in a forked child whose parent has run kernels on several: OpenMP's pool doesn't survive a fork,
// and would be waited for without end.
cpu::Parallel torch_parallel();

}  // namespace fusednn
