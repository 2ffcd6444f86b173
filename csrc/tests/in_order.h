// A schedule for the length of a scope.
#pragma once

#include "cuda_on_cpu.h"

class InOrder {
 public:
  explicit InOrder(cuda_on_cpu::Order order, uint64_t seed = 0) : before_(cuda_on_cpu::schedule()) {
    cuda_on_cpu::schedule() = {order, seed};
  }
  ~InOrder() { cuda_on_cpu::schedule() = before_; }
  InOrder(const InOrder&) = delete;
  InOrder& operator=(const InOrder&) = delete;

 private:
  cuda_on_cpu::Schedule before_;
};
