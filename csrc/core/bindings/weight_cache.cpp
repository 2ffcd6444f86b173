#include "core/bindings/weight_cache.h"

#include <c10/core/CPUAllocator.h>
#include <pthread.h>

#include <algorithm>
#include <cstring>

namespace fusednn {
namespace {

constexpr int64_t kSamples = 32;

uint64_t fingerprint(const at::Tensor& t) {
  const int64_t n = t.numel(), item = t.element_size();
  const int64_t samples = std::min(n, kSamples);
  const int64_t columns = t.dim() > 0 ? t.size(-1) : 1;
  const char* data = static_cast<const char*>(t.const_data_ptr());
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t at = samples > 1 ? i * (n - 1) / (samples - 1) : 0;
    const int64_t offset = t.dim() == 2 ? at / columns * t.stride(0) + at % columns * t.stride(1) : at;
    uint64_t bits = 0;
    std::memcpy(&bits, data + offset * item, item);
    hash = (hash ^ bits) * 1099511628211u;
  }
  return hash;
}

// Whether this process's version counter sees what torch writes here. Nobody counts writes to tensors made in
// inference mode, nor what others write to memory that they share or have lent: processes, files, numpy.
bool counts_writes(const at::Tensor& weight) {
  if (weight.is_inference()) return false;
  return weight.storage().data_ptr().get_deleter() == c10::GetCPUAllocator()->raw_deleter();
}

}  // namespace

WeightIdentity::WeightIdentity(const at::Tensor& weight)
    : storage_(weight.storage().getWeakStorageImpl()),
      data_(weight.const_data_ptr()),
      sizes_(weight.sizes().vec()),
      strides_(weight.strides().vec()),
      dtype_(weight.scalar_type()),
      version_(weight._version()),
      fingerprint_(fingerprint(weight)) {}

bool WeightIdentity::same_place(const WeightIdentity& other) const {
  return data_ == other.data_ && storage_ == other.storage_ && sizes_ == other.sizes_ &&
         strides_ == other.strides_ && dtype_ == other.dtype_;
}

bool WeightIdentity::same_content(const WeightIdentity& other) const {
  return version_ == other.version_ && fingerprint_ == other.fingerprint_;
}

bool WeightCache::may_keep(const std::vector<at::Tensor>& weights) const {
  return keeps_ && std::all_of(weights.begin(), weights.end(), counts_writes);
}

at::Tensor WeightCache::find(PackingKey key, const std::vector<at::Tensor>& weights,
                             const std::function<at::Tensor()>& pack) {
  if (!may_keep(weights)) return {};
  std::vector<WeightIdentity> identities(weights.begin(), weights.end());
  const auto all = [&](const Entry& entry, auto test) {
    return std::equal(entry.weights.begin(), entry.weights.end(), identities.begin(), identities.end(), test);
  };
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Entry& entry : entries_) {
    if (entry.key != key || !all(entry, std::mem_fn(&WeightIdentity::same_place))) continue;
    if (all(entry, std::mem_fn(&WeightIdentity::same_content))) {
      if (!entry.packed.defined()) entry.packed = pack();
      return entry.packed;
    }
    entry.weights = std::move(identities);
    entry.packed.reset();
    return {};
  }
  std::erase_if(entries_, [](const Entry& entry) {
    return std::any_of(entry.weights.begin(), entry.weights.end(), std::mem_fn(&WeightIdentity::expired));
  });
  if (entries_.size() == kMostEntries) entries_.erase(entries_.begin());
  entries_.push_back({std::move(key), std::move(identities), {}});
  return {};
}

WeightCache& WeightCache::instance() {
  static WeightCache* const cache = [] {
    // A child must not inherit a lock whose holder it lacks.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
    return new WeightCache;  // never destroyed: tensors must not outlive torch
  }();
  return *cache;
}

void WeightCache::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  entries_.clear();
}

int64_t WeightCache::packed_entries() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::count_if(entries_.begin(), entries_.end(), [](const Entry& e) { return e.packed.defined(); });
}

}  // namespace fusednn
