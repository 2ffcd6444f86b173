// Packed weights, kept between calls for as long as they are surely those of the weights given.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <string_view>
#include <vector>

#include "core/cpu/features.h"

namespace fusednn {

// What the packing was made from. Two weights are taken for the same only if all of these agree:
//   storage      the same object, still alive (held weakly, so that an address used again can't deceive)
//   layout       data pointer, sizes, strides, dtype
//   version      counts in-place changes: optimizer steps, load_state_dict, copy_, ...
//   fingerprint  some elements' bits: catches writes past the version counter (weight.data.mul_(2), numpy)
class WeightIdentity {
 public:
  explicit WeightIdentity(const at::Tensor& weight);
  bool same_place(const WeightIdentity& other) const;
  bool same_content(const WeightIdentity& other) const;
  bool expired() const { return storage_.expired(); }

 private:
  c10::weak_intrusive_ptr<c10::StorageImpl> storage_;
  const void* data_;
  std::vector<int64_t> sizes_, strides_;
  at::ScalarType dtype_;
  uint32_t version_;
  uint64_t fingerprint_;
};

// How weights were packed.
struct PackingKey {
  std::string_view kind;          // who reads the packing: a literal
  std::vector<double> numbers{};  // that the packing depends on too
  cpu::Isa isa = cpu::current_isa();

  bool operator==(const PackingKey&) const = default;
};

class WeightCache {
 public:
  static WeightCache& instance();  // the process's

  // Whether a packing of these weights may outlive a call.
  bool may_keep(const std::vector<at::Tensor>& weights) const;
  // The packing of `weights` for `key`, made by `pack` at the second sight of the same weights and then kept;
  // undefined at the first: what is used once is not worth the memory.
  at::Tensor find(PackingKey key, const std::vector<at::Tensor>& weights,
                  const std::function<at::Tensor()>& pack);
  void keep(bool on) { keeps_ = on; }  // off: find() finds nothing
  void clear();
  int64_t packed_entries();

 private:
  struct Entry {
    PackingKey key;
    std::vector<WeightIdentity> weights;
    at::Tensor packed;
  };
  static constexpr size_t kMostEntries = 256;

  std::atomic<bool> keeps_{true};
  std::mutex mutex_;
  std::vector<Entry> entries_;
};

}  // namespace fusednn
