// How attention's operands lie in the workspace, widened to the accumulator T.
//
//   panels  [C / P][D][P]   keys (backward: values, too) transposed, P = kWide vectors of columns; zeros beyond C
//   rows    [C][pitch]      as they come, a row padded with zeros to whole vectors
//
// C = S + X columns: those of the tensor, then the extra ones.
#pragma once

#include "attention/cpu/params.h"
#include "attention/cpu/product.h"
#include "core/cpu/carver.h"
#include "core/cpu/transpose.h"

namespace fusednn::cpu::FUSEDNN_ISA {

template <class T>
constexpr int64_t kPanelColumns = kWide * Vec<T>::size;

// Columns of one head of one sequence: rows in memory, those of the tensor and the extra ones.
template <class S>
struct Source {
  const S* rows;
  int64_t stride, count;
  const S* extra;  // contiguous
  int64_t extra_count, size;

  int64_t columns() const { return count + extra_count; }
  FUSEDNN_INLINE const S* row(int64_t j) const {
    return j < count ? rows + j * stride : extra + (j - count) * size;
  }
};

// One block of w columns by w dimensions of a panel.
template <class T, class S>
FUSEDNN_INLINE void pack_block(const Source<S>& from, int64_t column, int64_t dim, T* panel) {
  constexpr int w = Vec<T>::size;
  const int64_t columns = from.columns() - column, dims = from.size - dim;
  Vec<T> x[w];
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i)
    x[i] = i < columns ? Vec<T>::load(from.row(column + i) + dim, dims) : Vec<T>(T(0));
  transpose(x);
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i) {
    if (i >= dims) break;
    x[i].store(panel + (dim + i) * kPanelColumns<T>);
  }
}

// Panel number `index`.
template <class T, class S>
void pack_panel_of_columns(const Source<S>& from, int64_t index, T* panels) {
  constexpr int w = Vec<T>::size;
  T* panel = panels + index * from.size * kPanelColumns<T>;
  for (int64_t j = 0; j < kPanelColumns<T>; j += w)
    for (int64_t d = 0; d < from.size; d += w) pack_block(from, index * kPanelColumns<T> + j, d, panel + j);
}

// The panels that hold columns [begin, end); begin is a panel's first.
template <class T, class S>
void pack_panels_of_columns(const Source<S>& from, int64_t begin, int64_t end, T* panels) {
  for (int64_t i = begin / kPanelColumns<T>; i * kPanelColumns<T> < end; ++i)
    pack_panel_of_columns(from, i, panels);
}

// Rows [begin, end) to out + row * pitch; says whether all numbers are finite.
template <class T, class S>
bool pack_rows(const Source<S>& from, int64_t begin, int64_t end, int64_t pitch, T* out, T factor = T(1)) {
  constexpr int w = Vec<T>::size;
  Vec<T> check(T(0));  // NaN once a number was not finite
  const Vec<T> zero(T(0)), by(factor);
  for (int64_t j = begin; j < end; ++j) {
    const S* row = from.row(j);
    for (int64_t d = 0; d < pitch; d += w) {
      const Vec<T> x = d < from.size ? Vec<T>::load(row + d, from.size - d) : zero;
      check = check + x * zero;
      (x * by).store(out + j * pitch + d);
    }
  }
  return sum(check) == T(0);
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
