// Storage types that the kernels understand. Arithmetic is float for every type but f64.
#pragma once

namespace fusednn {

enum class DType : int { f32, f64, f16, bf16 };

}  // namespace fusednn
