// cudaLaunchKernelEx for kernels that are plain functions.
#pragma once

#include <tuple>

#include "cuda_on_cpu/core.h"
#include "cuda_runtime_api.h"

enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeCooperative = 2 };

union cudaLaunchAttributeValue {
  char pad[64];
  int cooperative;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  cuda_on_cpu::LaunchShape shape{config->gridDim, config->blockDim, config->dynamicSmemBytes, false};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) shape.cooperative = attribute.val.cooperative != 0;
  }
  // The lambda's parameters convert the arguments as a call of the kernel would.
  auto start = [&](Params... params) {
    std::tuple<Params...> stored(params...);
    auto thread = [&] { std::apply(kernel, stored); };
    using Thread = decltype(thread);
    auto body = [](void* context) { (*static_cast<Thread*>(context))(); };
    return cuda_on_cpu::launch(shape, reinterpret_cast<const void*>(kernel), body, &thread);
  };
  return static_cast<cudaError_t>(start(static_cast<Args&&>(args)...));
}
