// Threads come from the caller (torch's OpenMP pool in the bindings), so that there is never a second pool.
#pragma once

#include <cstdint>

namespace fusednn::cpu {

struct Parallel {
  using Body = void (*)(void* context, int64_t begin, int64_t end, int thread);

  int threads;  // body's `thread` stays below this
  // Cuts [0, n) into at most `threads` ranges and calls body on each.
  void (*run)(int64_t n, Body body, void* context);

  template <class F>
  void operator()(int64_t n, bool worth_it, const F& f) const {
    if (n <= 0) return;
    if (n == 1 || threads == 1 || !worth_it) {
      f(int64_t{0}, n, 0);
      return;
    }
    run(
        n,
        [](void* context, int64_t begin, int64_t end, int thread) {
          (*static_cast<const F*>(context))(begin, end, thread);
        },
        const_cast<F*>(&f));
  }
};

}  // namespace fusednn::cpu
