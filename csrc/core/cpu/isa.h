// Every kernel source is compiled once per instruction set into a namespace of its own. Such a source keeps
// away from the standard library's templates: an inline function compiled with AVX-512 could be the copy that
// the linker keeps for everyone.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(FUSEDNN_ISA_AVX512)
#define FUSEDNN_ISA avx512
#define FUSEDNN_VECTOR_BYTES 64
#elif defined(FUSEDNN_ISA_AVX2)
#define FUSEDNN_ISA avx2
#define FUSEDNN_VECTOR_BYTES 32
#else
#define FUSEDNN_ISA baseline
#define FUSEDNN_VECTOR_BYTES 16
#endif

#define FUSEDNN_INLINE inline __attribute__((always_inline))
