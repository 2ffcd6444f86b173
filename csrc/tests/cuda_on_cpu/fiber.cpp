#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#include "sanitizer.h"

namespace cuda_on_cpu {
namespace {

// Untouched pages cost nothing; instrumented frames are several times larger than plain ones.
constexpr size_t stack_bytes = 256 * 1024;

}  // namespace

#if defined(CUDA_ON_CPU_UCONTEXT)

void Fiber::switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

void Fiber::start(void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = stack_bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

#else

// Saves the callee-saved registers on the stack, stores its pointer, and does the reverse on the other one.
// swapcontext would make a system call each time for the signal mask, which fibers share.
extern "C" void cuda_on_cpu_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
constexpr size_t saved_words = 8;  // six registers, the entry as return address, a null one below it
constexpr size_t entry_word = 6;
#else
asm(R"(
.text
.globl cuda_on_cpu_switch
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, %function
cuda_on_cpu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
constexpr size_t saved_words = 20;
constexpr size_t entry_word = 11;
#endif

void Fiber::switch_context(Context& from, Context& to) { cuda_on_cpu_switch(&from, to); }

void Fiber::start(void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>(stack_ + stack_bytes);
  uintptr_t* frame = top - saved_words;
  for (size_t i = 0; i < saved_words; ++i) frame[i] = 0;
  frame[entry_word] = reinterpret_cast<uintptr_t>(entry);
  context_ = frame;
}

#endif

bool Fiber::allocate() {
  if (stack_ != nullptr) return true;
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, guard + stack_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) return false;
  mprotect(memory, guard, PROT_NONE);
  stack_ = static_cast<char*>(memory) + guard;
  return true;
}

Fiber::~Fiber() {
  if (stack_ == nullptr) return;
  forget_history();
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  munmap(stack_ - guard, guard + stack_bytes);
}

void Fiber::resume() {
#if defined(CUDA_ON_CPU_TSAN)
  constexpr unsigned no_sync = 1;
  if (tsan_fiber_ == nullptr) tsan_fiber_ = __tsan_create_fiber(0);
  tsan_host_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_fiber_, no_sync);
#endif
#if defined(CUDA_ON_CPU_ASAN)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, stack_, stack_bytes);
#endif
  switch_context(host_, context_);
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Fiber::entered() { returned(nullptr); }

void Fiber::returned([[maybe_unused]] void* fake_stack) {
#if defined(CUDA_ON_CPU_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack, &host_bottom_, &host_size_);
#endif
}

void Fiber::leave([[maybe_unused]] bool last) {
#if defined(CUDA_ON_CPU_TSAN)
  constexpr unsigned no_sync = 1;
  __tsan_switch_to_fiber(tsan_host_, no_sync);
#endif
#if defined(CUDA_ON_CPU_ASAN)
  // A null place to save to frees the fake stack of a fiber that will not come back.
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, host_bottom_, host_size_);
#endif
  switch_context(context_, host_);
}

void Fiber::suspend() {
  leave(false);
  returned(fake_stack_);
}

void Fiber::finish() {
  leave(true);
  abort();
}

void Fiber::forget_history() {
#if defined(CUDA_ON_CPU_TSAN)
  if (tsan_fiber_ != nullptr) __tsan_destroy_fiber(tsan_fiber_);
  tsan_fiber_ = nullptr;
#endif
}

}  // namespace cuda_on_cpu
