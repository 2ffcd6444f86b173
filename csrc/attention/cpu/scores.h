// From products q . k to weights, row by row of a block of columns. Scores are in base 2: q is scaled by
// scale log2(e), so that a weight is 2^(s - lse).
//
//   s = cap tanh(s / cap)                      softcap
//   s -= slope |i + offset - j|                ALiBi
//   s += mask[i, j] + key_mask[j], or -inf     what is not kept is selected, not added: it may be NaN
//
// exp2: t = n + f, |f| <= 1/2: 2^n (1 + f Q(f)), Q by Remez exchange (relative error 4e-9; double 1e-19); 0
// below the normal numbers.
#pragma once

#include "attention/cpu/pack.h"
#include "core/cpu/vec_math.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class T>
FUSEDNN_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return Vec<T>(a.v > b.v ? a.v : b.v);
}

template <class T>
struct Exp2Constants;
template <>
struct Exp2Constants<float> {
  static constexpr float lowest = -126.f;
  static constexpr int degree = 5;
  static constexpr float q[] = {0.693147188f,   0.2402265108f,   0.05550357105f,
                                0.00961803077f, 0.001339086691f, 0.0001546973528f};
};
template <>
struct Exp2Constants<double> {
  static constexpr double lowest = -1022.;
  static constexpr int degree = 11;
  static constexpr double q[] = {
      0.69314718055994530925,     0.24022650695910071224,    0.055504108664821627044,
      0.0096181291076284866191,   0.0013333558146406469325,  0.00015403530393354770721,
      0.000015252733841558303334, 1.3215486823300067982e-6,  1.0178057087034593113e-7,
      7.054891466276941686e-9,    4.4558180205427497884e-10, 2.5737815775189043209e-11};
};

// 2^t for t of at most about 127; 0 where that would not be a normal number; NaN stays NaN.
template <class T>
FUSEDNN_INLINE Vec<T> exp2(Vec<T> t) {
  using C = Exp2Constants<T>;
  using V = Vec<T>;
  const V round(ExpConstants<T>::round);
  const V shifted = t + round;
  const V f = t - (shifted - round);
  V q(C::q[C::degree]);
#pragma GCC unroll 12
  for (int i = C::degree - 1; i >= 0; --i) q = q * f + V(C::q[i]);
  const V y = (q * f + V(T(1))) * power_of_two<T>(shifted.bits() - round.bits());
  const V none(T(0));
  return V(t.v < V(C::lowest).v ? none.v : y.v);
}

struct Columns {
  int64_t begin, end;
};

// One sample, or one of the packed sequences.
struct Sequence {
  int64_t index, batch;
  int64_t first_row, rows, first_column, columns;

  Sequence(const Attention& c, int64_t n)
      : index(n), batch(n), first_row(0), rows(c.rows), first_column(0), columns(c.columns) {
    if (!c.cu_seqlens_q) return;
    batch = 0;
    first_row = c.cu_seqlens_q[n], rows = c.cu_seqlens_q[n + 1] - first_row;
    first_column = c.cu_seqlens_k[n], columns = c.cu_seqlens_k[n + 1] - first_column;
  }
};

// Whether a row's scores are the products alone.
inline bool plain_scores(const Attention& c) {
  return c.softcap == 0 && !c.alibi_slopes && !c.mask.data && !c.key_mask.data && c.window_left < 0 &&
         c.window_right < 0;
}

// Columns of the tensor that rows [begin, end) can keep, by the window.
inline Columns seen_columns(const Attention& c, int64_t begin, int64_t end, Columns within) {
  Columns seen = within;
  if (c.window_left >= 0) seen.begin = maximum(seen.begin, begin + c.position_offset - c.window_left);
  if (c.window_right >= 0) seen.end = minimum(seen.end, end + c.position_offset + c.window_right);
  if (seen.begin >= seen.end) return {within.begin, within.begin};
  return seen;
}

template <class T, class S>
FUSEDNN_INLINE Vec<T> strided_load(const S* p, int64_t stride, int64_t n) {
  if (stride == 1) return Vec<T>::load(p, n);
  T values[Vec<T>::size];
  for (int i = 0; i < Vec<T>::size; ++i) values[i] = i < n ? static_cast<T>(widen(p[i * stride])) : T(0);
  return Vec<T>::load(values);
}

// 0 where true, -inf where not.
template <class T>
FUSEDNN_INLINE Vec<T> hidden(const bool* p, int64_t stride, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    if (stride == 1 && n >= Vec<T>::size) {
      const __m512i bytes =
          _mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      const __mmask16 off = _mm512_cmpeq_epi32_mask(bytes, _mm512_setzero_si512());
      return Vec<T>((typename Vec<T>::Native)_mm512_maskz_mov_ps(off, _mm512_set1_ps(-__builtin_inff())));
    }
  }
#endif
  T values[Vec<T>::size];
  for (int i = 0; i < Vec<T>::size; ++i) values[i] = i < n && p[i * stride] ? T(0) : -kInfinity<T>;
  return Vec<T>::load(values);
}

template <class T>
FUSEDNN_INLINE Vec<T> add_or_hide(Vec<T> s, Vec<T> bias) {
  const Vec<T> none(-kInfinity<T>);  // what is hidden already stays so, whatever the bias is
  return Vec<T>(((bias.v == none.v) | (s.v == none.v)) ? none.v : (s + bias).v);
}

// A mask's number in base 2; finite ones, such as the dtype's least, stay finite.
template <class T>
FUSEDNN_INLINE Vec<T> in_base_2(Vec<T> bias) {
  const Vec<T> none(-kInfinity<T>), least(-kLargest<T>), most(kLargest<T>);
  const Vec<T> scaled = bias * Vec<T>(T(kLog2e));
  const Vec<T> held(scaled.v < least.v ? least.v : scaled.v > most.v ? most.v : scaled.v);
  return Vec<T>(bias.v == none.v ? none.v : held.v);
}

// key_mask of one sequence in base 2: what is added to a column's scores, -inf where it is hidden; extra
// columns 0. Returns the columns of the tensor between the first and the last that are kept.
template <class T, class S>
Columns widen_key_mask(const Attention& c, const Sequence& q, T* bias) {
  Columns kept{q.columns, 0};
  const int64_t at = q.batch * c.key_mask.batch_stride, step = c.key_mask.column_stride;
  for (int64_t j = 0; j < q.columns; ++j) {
    if (c.key_mask.is_bool) {
      bias[j] = static_cast<const bool*>(c.key_mask.data)[at + j * step] ? T(0) : -kInfinity<T>;
    } else {
      T number[Vec<T>::size];
      in_base_2(Vec<T>(T(widen(static_cast<const S*>(c.key_mask.data)[at + j * step])))).store(number);
      bias[j] = number[0];
    }
    if (bias[j] == -kInfinity<T>) continue;
    kept.begin = minimum(kept.begin, j);
    kept.end = j + 1;
  }
  for (int64_t j = q.columns; j < padded<T>(q.columns + c.extra); ++j) bias[j] = T(0);
  if (kept.begin >= kept.end) return {0, 0};
  return kept;
}

// A row of scores: products of row i of a head with columns [first, first + count), in place. What lies
// beyond them, up to whole vectors, becomes -inf. `capped`, if not null, takes tanh(s / cap).
template <class T, class S>
void finish_scores(const Attention& c, const Sequence& q, int64_t head, int64_t row, int64_t first,
                   int64_t count, const T* key_bias, T* s, T* capped) {
  using V = Vec<T>;
  constexpr int w = V::size;
  const V none(-kInfinity<T>);
  if (c.softcap > 0) {
    const V cap(T(c.softcap * kLog2e)), inverse(T(1 / (c.softcap * kLog2e)));
    for (int64_t j = 0; j < count; j += w) {
      const V t = tanh(V::load(s + j) * inverse);
      if (capped) t.store(capped + j);
      (t * cap).store(s + j);
    }
  }
  const int64_t real = minimum(count, q.columns - first);  // of the tensor; may be negative
  if (c.alibi_slopes) {
    const T slope = T(c.alibi_slopes[head] * kLog2e);
    const T at = static_cast<T>(row + c.position_offset - first);
    T from[w];
    for (int i = 0; i < w; ++i) from[i] = static_cast<T>(i);
    for (int64_t j = 0; j < real; j += w) {
      const V distance = abs(V(at - static_cast<T>(j)) - V::load(from));
      (V::load(s + j, real - j) - V(slope) * distance).store(s + j, real - j);
    }
  }
  if (c.mask.data) {
    const Mask& m = c.mask;
    const int64_t step = m.column_stride;
    const int64_t at = q.batch * m.batch_stride + head * m.head_stride + row * m.row_stride + first * step;
    for (int64_t j = 0; j < real; j += w) {
      const int64_t n = minimum(w, real - j);
      const V bias = m.is_bool
                         ? hidden<T>(static_cast<const bool*>(m.data) + at + j * step, step, n)
                         : in_base_2(strided_load<T>(static_cast<const S*>(m.data) + at + j * step, step, n));
      add_or_hide(V::load(s + j, n), bias).store(s + j, n);
    }
  }
  if (key_bias)
    for (int64_t j = 0; j < count; j += w)
      add_or_hide(V::load(s + j), V::load(key_bias + first + j, count - j)).store(s + j);
  const Columns seen = seen_columns(c, row, row + 1, {0, q.columns});
  for (int64_t j = 0; j < minimum(real, seen.begin - first); ++j) s[j] = -kInfinity<T>;
  for (int64_t j = maximum(0, seen.end - first); j < real; ++j) s[j] = -kInfinity<T>;
  for (int64_t j = count; j < padded<T>(count); ++j) s[j] = -kInfinity<T>;
}

// out[j] = row[j] by for j < count; the row has whole vectors.
template <class T, class S>
FUSEDNN_INLINE void scale_row(const T* row, int64_t count, T by, S* out) {
  for (int64_t j = 0; j < count; j += Vec<T>::size)
    (Vec<T>::load(row + j) * Vec<T>(by)).store(out + j, count - j);
}

template <class T>
FUSEDNN_INLINE T horizontal_largest(Vec<T> x) {
  T parts[Vec<T>::size];
  x.store(parts);
  for (int width = Vec<T>::size / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] = parts[i] > parts[i + width] ? parts[i] : parts[i + width];
  return parts[0];
}

template <class T>
T largest_of(const T* s, int64_t count) {  // whole vectors
  using V = Vec<T>;
  constexpr int w = V::size;
  V a(-kInfinity<T>), b = a;
  int64_t j = 0;
  for (; j + 2 * w <= count; j += 2 * w) {
    a = larger(V::load(s + j), a);
    b = larger(V::load(s + j + w), b);
  }
  if (j < count) a = larger(V::load(s + j), a);
  return horizontal_largest(larger(a, b));
}

// s = 2^(s - subtract) over whole vectors; returns the sum.
template <class T>
T exp2_row(T* s, int64_t count, T subtract) {
  using V = Vec<T>;
  constexpr int w = V::size;
  const V by(subtract);
  V a(T(0)), b(T(0));
  int64_t j = 0;
  for (; j + 2 * w <= count; j += 2 * w) {
    const V x = exp2(V::load(s + j) - by), y = exp2(V::load(s + j + w) - by);
    x.store(s + j);
    y.store(s + j + w);
    a = a + x;
    b = b + y;
  }
  if (j < count) {
    const V x = exp2(V::load(s + j) - by);
    x.store(s + j);
    a = a + x;
  }
  return sum(a + b);
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
