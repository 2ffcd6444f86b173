#include "core/bindings/scratch.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace fusednn {
namespace {

constexpr size_t kKeptBytes = size_t{64} << 20;  // in all
constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;  // a walk of the page tables for 2 MiB, not for 4 KiB

struct Buffer {
  void* data;
  size_t bytes;
};

// Never destroyed: calls may outlive static destructors.
struct Kept {
  std::mutex mutex;
  std::vector<Buffer> buffers;
  size_t bytes = 0;

  static Kept& instance() {
    static Kept* const kept = [] {
      // A child must not inherit a lock whose holder it lacks.
      pthread_atfork([] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); },
                     [] { instance().mutex.unlock(); });
      return new Kept;
    }();
    return *kept;
  }
  Buffer take(std::vector<Buffer>::iterator i) {
    const Buffer b = *i;
    bytes -= b.bytes;
    buffers.erase(i);
    return b;
  }
};

bool smaller(const Buffer& a, const Buffer& b) { return a.bytes < b.bytes; }

}  // namespace

// The smallest kept buffer that will do. Where none does, the largest makes way for a larger one.
Scratch::Scratch(size_t bytes) : data_(nullptr), bytes_(std::max(bytes, size_t{1})) {
  Buffer outgrown{nullptr, 0};
  {
    Kept& kept = Kept::instance();
    const std::lock_guard<std::mutex> lock(kept.mutex);
    const auto fit = std::find_if(kept.buffers.begin(), kept.buffers.end(),
                                  [&](const Buffer& b) { return b.bytes >= bytes_; });
    if (fit != kept.buffers.end()) {
      const Buffer b = kept.take(fit);
      data_ = b.data;
      bytes_ = b.bytes;
      return;
    }
    if (!kept.buffers.empty()) outgrown = kept.take(kept.buffers.end() - 1);
  }
  std::free(outgrown.data);
  const size_t alignment = bytes_ >= kHugePage ? kHugePage : kAlignment;
  bytes_ = (bytes_ + alignment - 1) / alignment * alignment;
  data_ = std::aligned_alloc(alignment, bytes_);
  if (!data_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (alignment == kHugePage) madvise(data_, bytes_, MADV_HUGEPAGE);  // advice: it may be refused
#endif
}

Scratch::~Scratch() {
  Kept& kept = Kept::instance();
  {
    const std::lock_guard<std::mutex> lock(kept.mutex);
    if (kept.bytes + bytes_ <= kKeptBytes) {
      const Buffer b{data_, bytes_};
      kept.buffers.insert(std::upper_bound(kept.buffers.begin(), kept.buffers.end(), b, smaller), b);
      kept.bytes += bytes_;
      return;
    }
  }
  std::free(data_);
}

}  // namespace fusednn
