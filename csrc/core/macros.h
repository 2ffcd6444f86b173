// Formulas in csrc/math serve the host and the device alike.
#pragma once

#if defined(__CUDACC__)
#define FUSEDNN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FUSEDNN_HOST_DEVICE inline __attribute__((always_inline))
#endif
