// Rows of P positions, in float or double: softmax and its backward.
//
// A row in the workspace begins on a cache line and ends in zeros, up to a whole number of vectors, so that
// only tensors have ends to mind.
#pragma once

#include "core/cpu/carver.h"
#include "core/cpu/vec_math.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kRowMultiple = 64;  // positions: whole vectors of every instruction set, whole cache lines
constexpr int64_t row_pitch(int64_t area) { return ceil_div(area, kRowMultiple) * kRowMultiple; }

// body(i, left) for each vector's first element; `left` is a constant but at a ragged end.
template <class T, class F>
FUSEDNN_INLINE void for_vectors(int64_t count, const F& body) {
  constexpr int w = Vec<T>::size;
  int64_t i = 0;
  for (; i + w <= count; i += w) body(i, int64_t{w});
  if (i < count) body(i, count - i);
}

// x where the mask's row of bits is set, 0 elsewhere; without a mask x.
template <class T>
FUSEDNN_INLINE Vec<T> kept(Vec<T> x, const T* keep, int64_t i) {
  return keep ? x & Vec<T>::load(keep + i) : x;
}

// A mask as rows of all-ones and zeros.
template <class T>
void expand_mask(const bool* mask, int64_t count, T* keep) {
  typename Accumulator<T>::type zero = 0;
  T ones;
  std::memset(&ones, 0xff, sizeof(ones));
  for (int64_t i = 0; i < count; ++i) std::memcpy(keep + i, mask[i] ? &ones : &zero, sizeof(T));
  for (int64_t i = count; i % Vec<T>::size != 0; ++i) keep[i] = 0;
}

template <class T, class S>
FUSEDNN_INLINE void widen_row(const S* from, int64_t count, T* to) {
  for_vectors<T>(count, [&](int64_t i, int64_t left) { Vec<T>::load(from + i, left).store(to + i); });
}

template <class T>
FUSEDNN_INLINE void fill_row(int64_t count, T value, T* to) {
  for_vectors<T>(count, [&](int64_t i, int64_t) { Vec<T>(value).store(to + i); });
}

template <class T, class S>
FUSEDNN_INLINE void widen_row_or_zero(const S* from, int64_t count, T* to) {
  if (from)
    widen_row(from, count, to);
  else
    fill_row(count, T(0), to);
}

template <class T, class S>
FUSEDNN_INLINE void narrow_row(const T* from, int64_t count, S* to) {
  for_vectors<T>(count, [&](int64_t i, int64_t left) { Vec<T>::load(from + i).store(to + i, left); });
}

template <class T>
FUSEDNN_INLINE void zero_end(int64_t count, T* row) {
  for (int64_t i = count; i % Vec<T>::size != 0; ++i) row[i] = 0;
}

// T as arithmetic takes it: normal, so that no quotient is 0 / 0.
template <class T>
T usable_temperature(double t) {
  const double least = sizeof(T) == 4 ? 0x1p-126 : 0x1p-1022;
  return static_cast<T>(t < least ? least : t);  // NaN stays
}

// a = softmax(s / t) in the place of the scores; 0 where the mask hides, and everywhere if no score is above -inf.
template <class T>
void softmax_row(int64_t count, const T* keep, T t, T* s) {
  using V = Vec<T>;
  const V lowest(-kInfinity<T>);
  for (int64_t i = count; i % V::size != 0; ++i) s[i] = -kInfinity<T>;
  V top = lowest;
  for_vectors<T>(count, [&](int64_t i, int64_t) {
    V x = V::load(s + i);
    if (keep) {
      x = select(V::load(keep + i).bits() != 0, x, lowest);
      x.store(s + i);
    }
    top = select(x > top, x, top);
  });
  T tops[V::size], largest = -kInfinity<T>;
  top.store(tops);
  for (const T x : tops) largest = x > largest ? x : largest;
  if (largest == -kInfinity<T>) largest = 0;

  V total(T(0));
  for_vectors<T>(count, [&](int64_t i, int64_t) {
    const V below = V::load(s + i) - V(largest);
    V weight = exp(t == T(1) ? below : below / V(t));
    weight = weight & V((typename V::Native) ~(below.v == lowest.v));
    weight.store(s + i);
    total = total + weight;
  });
  const T found = sum(total), divisor = found == T(0) ? T(1) : found;
  for_vectors<T>(count, [&](int64_t i, int64_t) { kept(V::load(s + i) / V(divisor), keep, i).store(s + i); });
  zero_end(count, s);
}

// sum over the row of d z log(a / largest a), the temperature's gradient but for -1 / T.
template <class T>
double temperature_term(int64_t count, const T* d_scaled, const T* a) {
  T largest = a[0];
  for (int64_t i = 1; i < count; ++i) largest = a[i] > largest || a[i] != a[i] ? a[i] : largest;
  if (largest == T(0)) largest = 1;
  double found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double ratio = static_cast<double>(a[i]) / largest;
    if (d_scaled[i] != T(0) || ratio != ratio) found += d_scaled[i] * __builtin_log(ratio);
  }
  return found;
}

// d s in the place of d a; `a` is the map's row. Adds to *d_temperature, if there is one.
template <class T>
void softmax_backward_row(int64_t count, const T* keep, const T* a, T t, T* d, double* d_temperature) {
  using V = Vec<T>;
  V dot(T(0));
  for_vectors<T>(count, [&](int64_t i, int64_t) {
    const V x = kept(V::load(d + i), keep, i);
    x.store(d + i);
    dot = dot + x * V::load(a + i);
  });
  const V mean(sum(dot));
  for_vectors<T>(count, [&](int64_t i, int64_t) { (V::load(a + i) * (V::load(d + i) - mean)).store(d + i); });
  zero_end(count, d);
  if (d_temperature) *d_temperature = temperature_term(count, d, a);
  if (t != T(1)) {
    for_vectors<T>(count, [&](int64_t i, int64_t) { (V::load(d + i) / V(t)).store(d + i); });
    zero_end(count, d);  // 0 / NaN
  }
}

// Rows x and y [2, pitch] of all positions: (2 i - (n - 1)) / (n - 1), -1 if n = 1.
template <class T>
void coordinate_rows(int64_t height, int64_t width, T* x, T* y) {
  const auto at = [](int64_t i, int64_t n) {
    return n > 1 ? static_cast<T>(2 * i - (n - 1)) / static_cast<T>(n - 1) : T(-1);
  };
  for (int64_t j = 0; j < height; ++j)
    for (int64_t i = 0; i < width; ++i) {
      x[j * width + i] = at(i, width);
      y[j * width + i] = at(j, height);
    }
  zero_end(height * width, x);
  zero_end(height * width, y);
}

template <class T>
FUSEDNN_INLINE T dot_rows(int64_t count, const T* a, const T* b) {
  Vec<T> total(T(0));
  for_vectors<T>(count,
                 [&](int64_t i, int64_t) { total = total + Vec<T>::load(a + i) * Vec<T>::load(b + i); });
  return sum(total);
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
