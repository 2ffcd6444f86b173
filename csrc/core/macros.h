// Formulas that the host and the device share, and functions of CUDA threads that also serve CPU kernels.
#pragma once

#if defined(__CUDACC__)
#define FUSEDNN_HOST_DEVICE __host__ __device__ __forceinline__
#define FUSEDNN_DEVICE __device__ __forceinline__
#else
#define FUSEDNN_HOST_DEVICE inline __attribute__((always_inline))
#define FUSEDNN_DEVICE inline __attribute__((always_inline))
#endif
