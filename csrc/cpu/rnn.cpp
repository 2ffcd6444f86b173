// The rnn kernels of one instruction set, as a table. This file is compiled once for each.
#include "fusednn/rnn_cpu.h"

#include "cpu/dtypes.h"
#include "cpu/rnn_backward.h"
#include "cpu/rnn_forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

template <class F>
auto with_cell(Cell cell, const F& f) {
  return cell == Cell::lstm ? f.template operator()<Cell::lstm>() : f.template operator()<Cell::gru>();
}

bool wants_packed(const CellWeights&, int64_t batch) { return batch >= 16; }

size_t packed_bytes(const CellWeights& q) {
  return with_types(q.dtype, [&]<class T, class S>() -> size_t {
    constexpr int w = Vec<T>::size;
    return ceil_div(q.hidden_size, w) * w * gates_of(q.cell) * (q.input_size + q.hidden_size) * sizeof(S);
  });
}

void pack_weights(const CellWeights& q, void* packed, const Parallel& parallel) {
  with_types(q.dtype, [&]<class T, class S>() {
    with_cell(q.cell, [&]<Cell cell>() { pack<cell, T, S>(q, packed, parallel); });
  });
}

size_t forward_workspace(const CellWeights& q) {
  return with_types(q.dtype, [&]<class T, class S>() { return forward_workspace_bytes<T>(); });
}

void forward(const CellForward& p, const Parallel& parallel) {
  with_types(p.weights.dtype, [&]<class T, class S>() {
    with_cell(p.weights.cell, [&]<Cell cell>() { cell_forward<cell, T, S>(p, parallel); });
  });
}

void backward(const GatesBackward& p, const Parallel& parallel) {
  with_types(p.dtype, [&]<class T, class S>() {
    with_cell(p.cell, [&]<Cell cell>() { gates_backward<cell, T, S>(p, parallel); });
  });
}

size_t product_workspace(const Product& p) {
  return with_types(p.b_dtype, [&]<class T, class S>() { return product_workspace_bytes<T>(); });
}

void product(const Product& p, const Parallel& parallel) {
  with_types(p.b_dtype, [&]<class T, class S>() { multiply<T, S>(p, parallel); });
}

void sum_over_rows(bool wide, int64_t M, int64_t N, const void* a, void* out, const Parallel& parallel) {
  wide ? sum_rows<double>(M, N, a, out, parallel) : sum_rows<float>(M, N, a, out, parallel);
}

template <class T>
void apply(int function, int64_t n, const T* x, T* out) {
  for (int64_t i = 0; i < n; i += Vec<T>::size) {
    const Vec<T> v = Vec<T>::load(x + i, n - i);
    const Vec<T> y = function == 0 ? exp(v) : function == 1 ? tanh(v) : sigmoid(v);
    y.store(out + i, n - i);
  }
}

void vector_math(int function, bool wide, int64_t n, const void* x, void* out) {
  if (wide)
    apply(function, n, static_cast<const double*>(x), static_cast<double*>(out));
  else
    apply(function, n, static_cast<const float*>(x), static_cast<float*>(out));
}

}  // namespace

extern const RnnKernels rnn_table = {
    wants_packed, packed_bytes,      pack_weights, forward_workspace, forward,
    backward,     product_workspace, product,      sum_over_rows,     vector_math,
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
