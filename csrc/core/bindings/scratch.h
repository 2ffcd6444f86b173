// Memory that a kernel works in. Buffers are kept from call to call: a fresh one is a page fault
// every 4 KiB, on each call.
#pragma once

#include <cstddef>

namespace fusednn {

class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }  // on a cache line's start

 private:
  void* data_;
  size_t bytes_;
};

}  // namespace fusednn
