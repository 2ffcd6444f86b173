// Activations in the epilogue of a convolution.
#pragma once

#include "core/macros.h"

namespace fusednn {

enum class Activation : int { none, relu, relu6, silu, hardswish, gelu, gelu_tanh };

// Calls f<activation>(): one branch for many elements.
template <class F>
FUSEDNN_DEVICE auto with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::relu:
      return f.template operator()<Activation::relu>();
    case Activation::relu6:
      return f.template operator()<Activation::relu6>();
    case Activation::silu:
      return f.template operator()<Activation::silu>();
    case Activation::hardswish:
      return f.template operator()<Activation::hardswish>();
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    case Activation::gelu_tanh:
      return f.template operator()<Activation::gelu_tanh>();
    default:
      return f.template operator()<Activation::none>();
  }
}

}  // namespace fusednn
