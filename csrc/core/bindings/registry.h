// A file of bindings adds to a submodule of the extension by itself:
//   FUSEDNN_BINDINGS(cpu) { m.def("limits", &limits); }
#pragma once

#include <pybind11/pybind11.h>

#include <string_view>

namespace fusednn {

class Bindings {
 public:
  using Bind = void (*)(pybind11::module_& m);

  Bindings(const char* submodule, Bind bind) : submodule_(submodule), bind_(bind), next_(first_) {
    first_ = this;
  }
  Bindings(const Bindings&) = delete;

  // Adds all that this binary has for `submodule` to `m`.
  static void fill(pybind11::module_& m, std::string_view submodule) {
    for (const Bindings* b = first_; b; b = b->next_)
      if (b->submodule_ == submodule) b->bind_(m);
  }
  // Makes the submodule, if there is anything for it.
  static void fill_submodule(pybind11::module_& m, const char* name, const char* doc) {
    const Bindings* b = first_;
    while (b && b->submodule_ != name) b = b->next_;
    if (!b) return;
    pybind11::module_ made = m.def_submodule(name, doc);
    fill(made, name);
  }

 private:
  std::string_view submodule_;
  Bind bind_;
  Bindings* next_;
  static inline Bindings* first_ = nullptr;
};

}  // namespace fusednn

#define FUSEDNN_BINDINGS(submodule) FUSEDNN_COUNTED_BINDINGS(submodule, __COUNTER__)
#define FUSEDNN_COUNTED_BINDINGS(submodule, n) FUSEDNN_NUMBERED_BINDINGS(submodule, n)
#define FUSEDNN_NUMBERED_BINDINGS(submodule, n)                                               \
  static void bind_##submodule##n(pybind11::module_& m);                                      \
  static const fusednn::Bindings registered_##submodule##n(#submodule, &bind_##submodule##n); \
  static void bind_##submodule##n(pybind11::module_& m)
