// torch's OpenMP threads for the kernels: torch.set_num_threads holds, and there is no second pool.
#pragma once

#include <ATen/Parallel.h>

#include "fusednn/parallel.h"

namespace fusednn {

inline cpu::Parallel torch_parallel() {
  return {at::get_num_threads(), [](int64_t n, cpu::Parallel::Body body, void* context) {
            at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
              body(context, begin, end, at::get_thread_num());
            });
          }};
}

}  // namespace fusednn
