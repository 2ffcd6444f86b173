#include "core/bindings/torch_parallel.h"

#include <ATen/Parallel.h>
#include <pthread.h>

#include <atomic>

namespace fusednn {
namespace {

std::atomic<bool> pool_used{false}, pool_lost{false};

void run_on_pool(int64_t n, cpu::Parallel::Body body, void* context) {
  pool_used.store(true, std::memory_order_relaxed);
  at::parallel_for(0, n, 1,
                   [&](int64_t begin, int64_t end) { body(context, begin, end, at::get_thread_num()); });
}

}  // namespace

cpu::Parallel torch_parallel() {
  [[maybe_unused]] static const int watched =
      pthread_atfork(nullptr, nullptr, [] { pool_lost = pool_used.load(); });
  return {pool_lost ? 1 : at::get_num_threads(), run_on_pool};
}

}  // namespace fusednn
