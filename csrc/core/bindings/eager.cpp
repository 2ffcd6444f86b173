#include "core/bindings/eager.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>

#include <algorithm>

namespace fusednn {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

bool subset(DispatchKeySet keys, DispatchKeySet allowed) {
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

// No mode, transform, tracer, autocast or profiler that would want to see the op.
bool nobody_listens() {
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  const DispatchKeySet usual =
      DispatchKeySet(DispatchKey::BackendSelect) | DispatchKeySet(DispatchKey::ADInplaceOrView);
  return subset(tls.included_, usual) && !at::autocast::is_autocast_enabled(at::kCPU) && !at::hasCallbacks();
}

bool supported(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kHalf || t == at::kBFloat16;
}

bool below_autograd() {
  return c10::impl::tls_local_dispatch_key_set().excluded_.has(DispatchKey::AutogradFunctionality);
}

pybind11::object or_none(const at::Tensor& t) {
  return t.defined() ? pybind11::cast(t) : pybind11::object(pybind11::none());
}

}  // namespace

bool plain(const at::Tensor& t) {
  const DispatchKeySet allowed =
      DispatchKeySet(DispatchKey::CPU) | DispatchKeySet(DispatchKey::ADInplaceOrView) |
      DispatchKeySet(DispatchKey::AutogradCPU) | DispatchKeySet(DispatchKey::AutocastCPU);
  return t.defined() && subset(t.key_set(), allowed);
}

PlainCall::PlainCall(const at::Tensor& first)
    : dtype_(first.scalar_type()),
      ok_(nobody_listens() && plain(first) && supported(dtype_)),
      requires_grad_(first.requires_grad()) {}

bool PlainCall::recorded() const { return requires_grad_ && at::GradMode::is_enabled(); }
bool PlainCall::ok() const { return ok_ && !(recorded() && below_autograd()); }

bool watched(const variable_list& grads) {
  return at::GradMode::is_enabled() || std::any_of(grads.begin(), grads.end(), [](const at::Tensor& g) {
           return g.defined() && (!plain(g) || g._fw_grad(0).defined());
         });
}

void composite_gradients(const char* name, at::TensorList tensors, const variable_list& grads,
                         at::ArrayRef<bool> needs, const pybind11::tuple& options,
                         std::span<at::Tensor> found) {
  pybind11::list inputs, cotangents, needed;
  for (const at::Tensor& t : tensors) inputs.append(or_none(t));
  for (const at::Tensor& g : grads) cotangents.append(or_none(g));
  for (const bool need : needs) needed.append(need);
  const auto eager = pybind11::module_::import("fusednn.core.eager");
  size_t i = 0;
  for (const auto& g : eager.attr("gradients")(name, inputs, cotangents, needed, options))
    found[i++] = g.is_none() ? at::Tensor() : g.cast<at::Tensor>();
}

}  // namespace fusednn
