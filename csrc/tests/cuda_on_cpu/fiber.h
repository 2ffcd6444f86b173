// Stackful contexts on one host thread. A Fiber runs `entry` on its own stack each time it is started, and
// must leave through finish(). Sanitizers are told of every switch; a switch does not synchronise.
#pragma once

#include <cstddef>

#if !defined(CUDA_ON_CPU_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define CUDA_ON_CPU_UCONTEXT 1
#endif

#if defined(CUDA_ON_CPU_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // False if there is no memory for a stack.
  bool allocate();
  // The next resume() calls `entry`, which must not return.
  void start(void (*entry)());
  // From the host: runs the fiber until it suspends or finishes.
  void resume();
  // From the fiber: back to the host.
  void suspend();
  [[noreturn]] void finish();
  // First thing in `entry`.
  void entered();
  // Drops the race detector's record of this fiber: after an unwound kernel it may be out of step.
  void forget_history();

 private:
#if defined(CUDA_ON_CPU_UCONTEXT)
  using Context = ucontext_t;
#else
  using Context = void*;  // the saved stack pointer
#endif
  static void switch_context(Context& from, Context& to);
  void leave(bool last);
  void returned(void* fake_stack);

  Context context_{}, host_{};
  char* stack_ = nullptr;
  void* tsan_fiber_ = nullptr;
  void* tsan_host_ = nullptr;
  void* fake_stack_ = nullptr;
  const void* host_bottom_ = nullptr;
  size_t host_size_ = 0;
};

}  // namespace cuda_on_cpu
