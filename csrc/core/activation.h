// Activations in the epilogue of a convolution.
#pragma once

namespace fusednn {

enum class Activation : int { none, relu, relu6, silu, hardswish, gelu, gelu_tanh };

}  // namespace fusednn
