// The five passes over a run of positions, and images [C, P], whose vectors lie along positions:
//
//   project    s[r, p] += sum_c k[r, c] f[c, p]                      scores; d a of a sum
//   contract   s[g, p] += sum_c e[g, c, p] f[c, p]                   d a of scaled features
//   reduce     q[r, c] += sum_p z[r, p] f[c, p]                      a sum over positions; d weight
//   scale      o[g, c, p] = a[g, p] f[c, p]
//   expand     o[c, p] = sum_g e[g, c, p] a[g, p] + sum_r k[r, c] z[r, p]      d f
//
// k, s, z and q are of the accumulator's type T, images of the storage type S. f is read once for all rows, a
// few channels at a time, and never where the mask is not set (`keep`; what project and contract find there
// is dropped by the softmax or its backward).
#pragma once

#include <array>

#include "spatial/cpu/rows.h"

namespace fusednn::cpu::FUSEDNN_ISA {

template <class T>
struct Rows {  // [count, ...]
  T* data;
  int64_t pitch, count;
  FUSEDNN_INLINE T* row(int64_t r) const { return data + r * pitch; }
};

// A run of positions of an image: element (c, p) at data + c pitch + p, of `channels` a map.
template <class S>
struct Planes {
  S* data;
  int64_t pitch, channels, length;
  FUSEDNN_INLINE S* plane(int64_t c) const { return data + c * pitch; }
};

// body.template operator()<K>(c): groups of K channels, and the last ones alone.
template <int K, class F>
FUSEDNN_INLINE void for_channels(int64_t channels, const F& body) {
  int64_t c = 0;
  for (; c + K <= channels; c += K) body.template operator()<K>(c);
  for (; c < channels; ++c) body.template operator()<1>(c);
}

// What one row s gets from the channels, K at a time: `of(c)(i, left)` is their sum at a vector of positions.
// kGroup channels are added up before they are added to the others, which bounds the sum's rounding.
template <int K, class T, class Of>
FUSEDNN_INLINE void sum_channels(int64_t channels, int64_t length, T* s, const Of& of) {
  using V = Vec<T>;
  constexpr int64_t kGroup = 64, kPart = 1024;
  alignas(64) T group[kPart];
  for (int64_t first = 0; first < length; first += kPart) {
    const int64_t count = minimum(kPart, length - first);
    for (int64_t begin = 0; begin < channels; begin += kGroup) {
      T* const to = begin == 0 ? s + first : group;
      const auto some = [&]<int N>(int64_t c, bool more) {
        const auto sum = of.template operator()<N>(c);
        for_vectors<T>(count, [&](int64_t i, int64_t left) {
          const V found = sum(first + i, left);
          (more ? V::load(to + i) + found : found).store(to + i);
        });
      };
      const int64_t end = minimum(channels, begin + kGroup);
      bool more = begin == 0;
      int64_t c = begin;
      for (; c + K <= end; c += K, more = true) some.template operator()<K>(c, more);
      for (; c < end; ++c, more = true) some.template operator()<1>(c, more);
      if (begin == 0) continue;
      for_vectors<T>(count, [&](int64_t i, int64_t) {
        (V::load(s + first + i) + V::load(group + i)).store(s + first + i);
      });
    }
  }
}

template <class T, class S>
void project(const Planes<const S>& f, Rows<const T> k, Rows<T> s) {
  using V = Vec<T>;
  if (k.count == 1) {
    sum_channels<8>(f.channels, f.length, s.data, [&]<int K>(int64_t c) {
      std::array<V, K> coefficients;
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) coefficients[j] = V(k.data[c + j]);
      return [&f, c, coefficients](int64_t i, int64_t left) __attribute__((always_inline)) {
        V found = V::load(f.plane(c) + i, left) * coefficients[0];
#pragma GCC unroll 8
        for (int j = 1; j < K; ++j) found = found + V::load(f.plane(c + j) + i, left) * coefficients[j];
        return found;
      };
    });
    return;
  }
  for_channels<8>(f.channels, [&]<int K>(int64_t c) {
    for_vectors<T>(f.length, [&](int64_t i, int64_t left) {
      V x[K];
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) x[j] = V::load(f.plane(c + j) + i, left);
      for (int64_t r = 0; r < k.count; ++r) {
        const T* at = k.row(r) + c;
        V found = x[0] * V(at[0]);
#pragma GCC unroll 8
        for (int j = 1; j < K; ++j) found = found + x[j] * V(at[j]);
        (V::load(s.row(r) + i) + found).store(s.row(r) + i);
      }
    });
  });
}

template <class T, class S>
void contract(const Planes<const S>& f, const Planes<const S>& e, Rows<T> s) {
  using V = Vec<T>;
  for (int64_t g = 0; g < s.count; ++g)
    sum_channels<8>(f.channels, f.length, s.row(g), [&]<int K>(int64_t c) {
      return [&f, &e, c, of_map = g * f.channels](int64_t i, int64_t left) __attribute__((always_inline)) {
        V found(T(0));
#pragma GCC unroll 8
        for (int64_t j = c; j < c + K; ++j)
          found = found + V::load(f.plane(j) + i, left) * V::load(e.plane(of_map + j) + i, left);
        return found;
      };
    });
}

// q[M, K] of M rows and K channels, each in a register.
template <int M, int K, class T, class S>
FUSEDNN_INLINE void reduce_tile(const Planes<const S>& f, int64_t c, Rows<const T> z, const T* keep, T* q,
                                int64_t q_pitch) {
  using V = Vec<T>;
  V acc[M][K];
  set_zero(acc);
  for_vectors<T>(f.length, [&](int64_t i, int64_t left) {
    V x[K];
#pragma GCC unroll 4
    for (int j = 0; j < K; ++j) x[j] = kept(V::load(f.plane(c + j) + i, left), keep, i);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V row = V::load(z.row(m) + i);
#pragma GCC unroll 4
      for (int j = 0; j < K; ++j) acc[m][j] = acc[m][j] + row * x[j];
    }
  });
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < K; ++j) q[m * q_pitch + c + j] += sum(acc[m][j]);
}

template <class T, class S>
void reduce(const Planes<const S>& f, Rows<const T> z, const T* keep, Rows<T> q) {
  for_channels<4>(f.channels, [&]<int K>(int64_t c) {
    int64_t r = 0;
    for (; r + 4 <= z.count; r += 4) reduce_tile<4, K>(f, c, {z.row(r), z.pitch, 4}, keep, q.row(r), q.pitch);
    for (; r < z.count; ++r) reduce_tile<1, K>(f, c, {z.row(r), z.pitch, 1}, keep, q.row(r), q.pitch);
  });
}

template <class T, class S>
void scale(const Planes<const S>& f, Rows<const T> a, const T* keep, const Planes<S>& out) {
  using V = Vec<T>;
  for (int64_t g = 0; g < a.count; ++g)
    for (int64_t c = 0; c < f.channels; ++c) {
      const S* from = f.plane(c);
      S* to = out.plane(g * f.channels + c);
      for_vectors<T>(f.length, [&](int64_t i, int64_t left) {
        kept(V::load(from + i, left) * V::load(a.row(g) + i), keep, i).store(to + i, left);
      });
    }
}

// The sum over r of k[r, c] z[r, p], for two sets of rows.
template <class T>
struct Products {
  Rows<const T> k, z;
};

template <class T, class S, class E>
void expand(const Products<T> (&sums)[2], const Planes<const E>& e, Rows<const T> a, const T* keep,
            const Planes<S>& out) {
  using V = Vec<T>;
  for_channels<4>(out.channels, [&]<int K>(int64_t c) {
    for_vectors<T>(out.length, [&](int64_t i, int64_t left) {
      V found[K];
      set_zero(found);
      for (int64_t g = 0; e.data && g < a.count; ++g) {
        const V weight = V::load(a.row(g) + i);
#pragma GCC unroll 4
        for (int j = 0; j < K; ++j)
          found[j] = found[j] + V::load(e.plane(g * out.channels + c + j) + i, left) * weight;
      }
      for (const Products<T>& set : sums)
        for (int64_t r = 0; r < set.k.count; ++r) {
          const V row = V::load(set.z.row(r) + i);
          const T* at = set.k.row(r) + c;
#pragma GCC unroll 4
          for (int j = 0; j < K; ++j) found[j] = found[j] + V(at[j]) * row;
        }
#pragma GCC unroll 4
      for (int j = 0; j < K; ++j) kept(found[j], keep, i).store(out.plane(c + j) + i, left);
    });
  });
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
