#include "core/bindings/eager_call.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/record_function.h>

#include <algorithm>

namespace fusednn {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

bool subset(DispatchKeySet keys, DispatchKeySet allowed) {
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

}  // namespace

bool nobody_listens() {
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  const DispatchKeySet usual =
      DispatchKeySet(DispatchKey::BackendSelect) | DispatchKeySet(DispatchKey::ADInplaceOrView);
  return subset(tls.included_, usual) && !at::autocast::is_autocast_enabled(at::kCPU) && !at::hasCallbacks();
}

bool plain(const at::Tensor& t) {
  const DispatchKeySet allowed =
      DispatchKeySet(DispatchKey::CPU) | DispatchKeySet(DispatchKey::ADInplaceOrView) |
      DispatchKeySet(DispatchKey::AutogradCPU) | DispatchKeySet(DispatchKey::AutocastCPU);
  return t.defined() && subset(t.key_set(), allowed);
}

bool supported(at::ScalarType t) {
  return t == at::kFloat || t == at::kDouble || t == at::kHalf || t == at::kBFloat16;
}

bool below_autograd() {
  return c10::impl::tls_local_dispatch_key_set().excluded_.has(DispatchKey::AutogradFunctionality);
}

bool watched(const torch::autograd::variable_list& grads) {
  return at::GradMode::is_enabled() || std::any_of(grads.begin(), grads.end(), [](const at::Tensor& g) {
           return g.defined() && (!plain(g) || g._fw_grad(0).defined());
         });
}

}  // namespace fusednn
