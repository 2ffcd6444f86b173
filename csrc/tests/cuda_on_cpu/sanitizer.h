// The sanitizers' interfaces, or nothing. The emulator itself is never instrumented: CUDA_ON_CPU_TSAN and
// CUDA_ON_CPU_ASAN say which run time it is linked with.
#pragma once

#include <cstddef>

#if defined(CUDA_ON_CPU_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

#if defined(CUDA_ON_CPU_ASAN)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
}
#endif

namespace cuda_on_cpu {

#if defined(CUDA_ON_CPU_TSAN)
inline constexpr bool tsan = true;
inline void tsan_acquire(void* token) { __tsan_acquire(token); }
inline void tsan_release(void* token) { __tsan_release(token); }
#else
inline constexpr bool tsan = false;
inline void tsan_acquire(void*) {}
inline void tsan_release(void*) {}
#endif

}  // namespace cuda_on_cpu
