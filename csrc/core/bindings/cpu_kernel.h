// What the bindings of CPU kernels share: tensors as kernels read them, and a kernel's run.
#pragma once

#include <type_traits>

#include "core/bindings/scratch.h"
#include "core/bindings/tensor_checks.h"
#include "core/bindings/torch_parallel.h"
#include "core/cpu/kernel_table.h"

namespace fusednn {

inline void check_on_cpu(const CheckedArguments& call) {
  TORCH_CHECK(call.options().device().is_cpu(), call.op(), ": got tensors on ", call.options().device(),
              ", expected cpu");
}

// Runs `kernel` on torch's threads, with the workspace that it asks for.
template <class Call>
void run_kernel(size_t (*workspace_bytes)(const Call&, int threads),
                void (*kernel)(const Call&, const cpu::Parallel&), std::type_identity_t<Call> call) {
  const cpu::Parallel threads = torch_parallel();
  const Scratch scratch(workspace_bytes(call, threads.threads));
  call.workspace = scratch.data();
  kernel(call, threads);
}

}  // namespace fusednn
