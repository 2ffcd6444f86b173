// What an eager shortcut asks before it goes past the dispatcher; docs/design/006-eager-shortcut.md.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/bindings/tensor_checks.h"

namespace fusednn {

// No mode, transform, tracer, autocast or profiler that would want to see the op.
bool nobody_listens();

// A dense CPU tensor: no subclass, no wrapper.
bool plain(const at::Tensor& t);

// Whether kernels know the dtype.
bool supported(at::ScalarType t);

// Whether autograd would record a call, but this one is made from below it.
bool below_autograd();

// The arguments of a call, looked at one by one.
struct PlainCall {
  at::ScalarType dtype;
  bool ok = true;
  bool requires_grad = false;

  // Folds one argument in: plain, of the common dtype and of this shape.
  void operator()(const at::Tensor& t, at::IntArrayRef sizes) {
    ok = ok && plain(t) && t.scalar_type() == dtype && t.sizes() == sizes;
    requires_grad = requires_grad || t.requires_grad();
  }
  void operator()(const OptionalTensor& t, at::IntArrayRef sizes) {
    if (t) (*this)(*t, sizes);
  }
};

// Whether the backward must be seen through: it is recorded, or its cotangents are mapped or have tangents.
bool watched(const torch::autograd::variable_list& grads);

inline OptionalTensor optional(const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
inline at::Tensor or_undefined(const OptionalTensor& t) { return t ? *t : at::Tensor(); }

}  // namespace fusednn
