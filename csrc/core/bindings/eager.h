// The eager shortcut, once for all layers: past the dispatcher where nothing but plain CPU tensors is
// involved and nobody listens; docs/design/006-eager-shortcut.md.
//
// A layer is a struct of
//   name, inputs              of its composite in fusednn/core/eager.py; how many tensors it takes
//   Options                   what it takes beside tensors, with FUSEDNN_ARGUMENTS
//   forward(tensors, options, save)                        -> EagerResults
//   backward(tensors, saved, grads, needs, options)        -> gradients of the tensors, as an array
// Tensors that are left out are undefined, and keep their index.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <span>

#include "core/bindings/op.h"
#include "core/bindings/tensor_checks.h"

namespace fusednn {

using torch::autograd::variable_list;

struct EagerResults {
  variable_list outputs;
  variable_list saved{};               // for the backward, beside the tensors
  variable_list not_differentiable{};  // of the outputs
};

inline OptionalTensor optional(const at::Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
inline at::Tensor or_undefined(const OptionalTensor& t) { return t ? *t : at::Tensor(); }

// A dense CPU tensor: no subclass, no wrapper.
bool plain(const at::Tensor& t);

// A call's tensors, looked at one by one, from the first, which sets the dtype.
class PlainCall {
 public:
  explicit PlainCall(const at::Tensor& first);

  // Folds one argument in: plain, of the common dtype and of this shape.
  void operator()(const at::Tensor& t, at::IntArrayRef sizes) {
    ok_ = ok_ && plain(t) && t.scalar_type() == dtype_ && t.sizes() == sizes;
    requires_grad_ = requires_grad_ || t.requires_grad();
  }
  void operator()(const OptionalTensor& t, at::IntArrayRef sizes) {
    if (t) (*this)(*t, sizes);
  }
  // Whether it may take the shortcut: not if autograd would record it, but is passed by already.
  bool ok() const;
  bool recorded() const;

 private:
  at::ScalarType dtype_;
  bool ok_, requires_grad_;
};

// Whether the backward must be seen through: it is recorded, or its cotangents are mapped or have tangents.
bool watched(const variable_list& grads);

// The gradients as autograd finds them for the layer's composite, which can be differentiated again.
void composite_gradients(const char* name, at::TensorList tensors, const variable_list& grads,
                         at::ArrayRef<bool> needs, const pybind11::tuple& options,
                         std::span<at::Tensor> found);

template <class Layer>
class EagerNode : public torch::autograd::Function<EagerNode<Layer>> {
  using Context = torch::autograd::AutogradContext;
  using Options = typename Layer::Options;
  static constexpr size_t kOtherArguments = 3;  // of forward, beside the edges

  struct Kept : torch::CustomClassHolder {
    Options options;
    explicit Kept(const Options& o) : options(o) {}
  };

 public:
  static variable_list forward(Context* ctx, at::TensorList /*edges*/, const at::TensorList* tensors,
                               const Options& options, EagerResults* results) {
    const at::AutoDispatchBelowADInplaceOrView below;
    *results = Layer::forward(*tensors, options, true);
    variable_list kept;
    kept.reserve(tensors->size() + results->saved.size());
    kept.insert(kept.end(), tensors->begin(), tensors->end());
    kept.insert(kept.end(), results->saved.begin(), results->saved.end());
    ctx->save_for_backward(std::move(kept));
    ctx->saved_data["options"] = c10::IValue::make_capsule(c10::make_intrusive<Kept>(options));
    ctx->set_materialize_grads(false);
    if (!results->not_differentiable.empty()) ctx->mark_non_differentiable(results->not_differentiable);
    return results->outputs;
  }

  static variable_list backward(Context* ctx, const variable_list& grads) {
    const variable_list kept = ctx->get_saved_variables();
    const at::TensorList all(kept), tensors = all.slice(0, Layer::inputs), saved = all.slice(Layer::inputs);
    std::array<bool, Layer::inputs> needs{};
    size_t edges = 0;
    for (size_t i = 0; i < Layer::inputs; ++i)
      if (tensors[i].defined()) needs[i] = ctx->needs_input_grad(edges++);
    std::array<at::Tensor, Layer::inputs> found;
    if (std::any_of(grads.begin(), grads.end(), [](const at::Tensor& g) { return g.defined(); })) {
      const auto capsule = ctx->saved_data["options"].toCapsule();
      const Options& options = static_cast<const Kept&>(*capsule).options;
      found = gradients(tensors, saved, grads, needs, options);
    }
    variable_list result;
    result.reserve(edges + kOtherArguments);
    for (size_t i = 0; i < Layer::inputs; ++i)
      if (tensors[i].defined()) result.push_back(needs[i] ? std::move(found[i]) : at::Tensor());
    result.resize(edges + kOtherArguments);
    return result;
  }

 private:
  static std::array<at::Tensor, Layer::inputs> gradients(at::TensorList tensors, at::TensorList saved,
                                                         const variable_list& grads,
                                                         const std::array<bool, Layer::inputs>& needs,
                                                         const Options& options) {
    if (watched(grads)) {
      const pybind11::gil_scoped_acquire gil;
      std::array<at::Tensor, Layer::inputs> found;
      composite_gradients(Layer::name, tensors, grads, needs, argument_tuple(options), found);
      return found;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    return Layer::backward(tensors, saved, grads, needs, options);
  }
};

// Runs the layer, recorded or not.
template <class Layer>
EagerResults run_eager(const std::array<at::Tensor, Layer::inputs>& given,
                       const typename Layer::Options& options, bool recorded) {
  const at::TensorList tensors(given);
  if (!recorded) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return Layer::forward(tensors, options, false);
  }
  variable_list edges;
  edges.reserve(tensors.size());
  for (const at::Tensor& t : tensors)
    if (t.defined()) edges.push_back(t);
  EagerResults results;
  results.outputs = EagerNode<Layer>::apply(at::TensorList(edges), &tensors, options, &results);
  return results;
}

}  // namespace fusednn
