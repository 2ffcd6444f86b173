// The rnn kernels of one instruction set, as a table. This file is compiled once for each.
#include "rnn/cpu/params.h"

#include "core/cpu/dtypes.h"
#include "rnn/cpu/backward.h"
#include "rnn/cpu/forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

template <class F>
auto with_cell(Cell cell, const F& f) {
  return cell == Cell::lstm ? f.template operator()<Cell::lstm>() : f.template operator()<Cell::gru>();
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

size_t gradient_workspace(bool wide) {
  return with_accumulator(wide, []<class T>() { return product_workspace_bytes<T>(); });
}

void gradient_sums(const GradientSums& p, const Parallel& parallel) {
  int64_t work = 0;
  for (int i = 0; i < p.weight_count; ++i)
    work += p.weights[i].batch * p.weights[i].gate_rows * p.weights[i].size;
  for (int i = 0; i < p.row_sum_count; ++i) work += p.row_sums[i].M * p.row_sums[i].N;
  const bool worth_it = work > kSerialWork;
  const int64_t parts = worth_it ? parallel.threads : 1;
  parallel(parts, worth_it, [&](int64_t begin, int64_t end, int thread) {
    void* workspace = static_cast<char*>(p.workspace) + thread * gradient_workspace(p.wide);
    for (int64_t part = begin; part < end; ++part) {
      for (int i = 0; i < p.weight_count; ++i)
        with_types(p.weights[i].weight_dtype,
                   [&]<class T, class S>() { weight_gradients<T, S>(p.weights[i], part, parts, workspace); });
      for (int i = 0; i < p.row_sum_count; ++i)
        with_accumulator(p.wide, [&]<class T>() { sum_rows<T>(p.row_sums[i], part, parts); });
    }
  });
}

}  // namespace

FUSEDNN_KERNELS(RnnKernels) = {
    forward_workspace, forward, backward, gradient_workspace, gradient_sums,
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
