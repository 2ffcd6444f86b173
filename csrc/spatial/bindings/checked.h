// A call's tensors, checked for kernels of any device; formulas in fusednn/spatial/reference.py.
#pragma once

#include "core/bindings/tensor_checks.h"
#include "spatial/bindings/calls.h"

namespace fusednn {

inline void check_temperature(const CheckedArguments& call, const calls::Temperature& given) {
  const OptionalTensor& learned = given.learned_temperature;
  if (!learned) return;
  TORCH_CHECK(learned->numel() == 1, call.op(), ": temperature: got shape ", learned->sizes(),
              ", expected one number");
  call.on_device("temperature", *learned);
}

// Every map a sample of its own, whose scores are the hidden term. `t` [N, G, H, W] is named `name`.
class CheckedSoftmax : public CheckedArguments {
 protected:
  CheckedSoftmax(const char* op, const char* name, const at::Tensor& t, const OptionalTensor& given_mask,
                 const calls::Temperature& temperature)
      : CheckedArguments(op, name, t) {
    TORCH_CHECK(t.dim() == 4 && t.size(2) > 0 && t.size(3) > 0, op, ": ", name, ": got shape ", t.sizes(),
                ", expected [N, G, H, W] with positions");
    check("mask", given_mask, {t.size(0), t.size(1), t.size(2) * t.size(3)}, at::kBool);
    mask = fusednn::dense(given_mask);
    check_temperature(*this, temperature);
  }

 public:
  OptionalTensor mask;
};

// Additive scores where there is v.
class CheckedSpatialAttention : public CheckedArguments {
 public:
  int64_t batch, channels, height, width, glimpses, rows;
  bool flat, of_images;     // what `attended` is
  at::MemoryFormat format;  // of the features
  at::Tensor weight;        // dense, as all below
  OptionalTensor v, mask;

  int64_t positions() const { return height * width; }
  at::DimVector map_sizes() const { return {batch, glimpses, height, width}; }
  at::DimVector attended_sizes() const {
    const int64_t maps = glimpses * channels;
    if (flat) return {batch, maps * positions()};
    if (of_images) return {batch, maps, height, width};
    return sums_ ? at::DimVector{batch, maps} : at::DimVector{batch, glimpses, 2};
  }

 protected:
  CheckedSpatialAttention(const char* op, const calls::SpatialAttentionForward& a)
      : CheckedArguments(op, "features", a.features) {
    const at::Tensor &f = a.features, &w = a.weight;
    TORCH_CHECK(f.dim() == 4, op, ": features: got shape ", f.sizes(), ", expected [N, C, H, W]");
    TORCH_CHECK(w.dim() == 2, op, ": weight: got shape ", w.sizes(), ", expected [rows, C]");
    TORCH_CHECK(!a.v || a.v->dim() == 2, op, ": v: got shape ", a.v->sizes(), ", expected [G, rows]");
    batch = f.size(0), channels = f.size(1), height = f.size(2), width = f.size(3);
    rows = w.size(0), glimpses = a.v ? a.v->size(0) : rows;
    TORCH_CHECK(positions() > 0, op, ": features: got shape ", f.sizes(), ", expected positions");
    format = f.suggest_memory_format();
    weight = dense("weight", w, {rows, channels});
    v = dense("v", a.v, {glimpses, rows});
    const at::DimVector term = v ? at::DimVector{batch, rows} : at::DimVector{batch, rows, positions()};
    check("hidden_term", a.hidden_term, term);
    check("mask", a.mask, {batch, positions()}, at::kBool);
    mask = fusednn::dense(a.mask);
    check_temperature(*this, a.temperature);
    of_images = a.output == "scale", flat = a.output == "flatten", sums_ = a.output == "sum";
    TORCH_CHECK_VALUE(of_images || flat || sums_ || a.output == "coordinates", op, ": output: got '",
                      a.output, "', expected 'scale', 'flatten', 'sum' or 'coordinates'");
  }

 private:
  bool sums_;
};

template <size_t N>
void check_wanted(const char* op, const std::array<bool, N>& wanted, const std::array<bool, N>& there) {
  for (size_t i = 0; i < N; ++i)
    TORCH_CHECK(there[i] || !wanted[i], op, ": output_mask: got true at ", i,
                ", expected no absent argument");
}

// The gradient of a learned temperature in its own type and shape; empty where it is not wanted.
inline at::Tensor temperature_gradient(const at::Tensor& found, bool wanted, const calls::Temperature& given,
                                       const CheckedArguments& call) {
  const OptionalTensor& learned = given.learned_temperature;
  return wanted ? found.to(learned->scalar_type()).reshape(learned->sizes()) : at::empty({0}, call.options());
}

}  // namespace fusednn
