#include "core/cpu/vector_math.h"

#include "core/cpu/vec_math.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

template <class T, class F>
void apply(int64_t n, const void* x, void* out, const F& f) {
  for (int64_t i = 0; i < n; i += Vec<T>::size)
    f(Vec<T>::load(static_cast<const T*>(x) + i, n - i)).store(static_cast<T*>(out) + i, n - i);
}

template <class F>
void apply(bool wide, int64_t n, const void* x, void* out, const F& f) {
  wide ? apply<double>(n, x, out, f) : apply<float>(n, x, out, f);
}

void all_exp(bool wide, int64_t n, const void* x, void* out) {
  apply(wide, n, x, out, [](auto v) { return exp(v); });
}
void all_tanh(bool wide, int64_t n, const void* x, void* out) {
  apply(wide, n, x, out, [](auto v) { return tanh(v); });
}
void all_sigmoid(bool wide, int64_t n, const void* x, void* out) {
  apply(wide, n, x, out, [](auto v) { return sigmoid(v); });
}

}  // namespace

FUSEDNN_KERNELS(VectorMath) = {all_exp, all_tanh, all_sigmoid};

}  // namespace fusednn::cpu::FUSEDNN_ISA
