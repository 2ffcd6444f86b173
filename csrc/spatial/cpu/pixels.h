// The passes of planes.h over images [P, C] (channels last), whose vectors lie along channels. A
// masked position is passed over.
#pragma once

#include "spatial/cpu/planes.h"

namespace fusednn::cpu::FUSEDNN_ISA {

// A run of positions of an image: element (c, p) at data + p pitch + c.
template <class S>
struct Pixels {
  S* data;
  int64_t pitch, channels, length;
  FUSEDNN_INLINE S* pixel(int64_t p) const { return data + p * pitch; }
};

constexpr int64_t kPixelChain = 64;  // positions that one accumulator takes: it bounds the sum's rounding

template <class T>
FUSEDNN_INLINE bool masked(const T* keep, int64_t p) {
  return keep && keep[p] == T(0);  // the bits of a position that takes part are a NaN
}

// s[p] += sum_c x(p, c) f[c, p], four positions at a time.
template <class T, class S, class X>
FUSEDNN_INLINE void dot_pixels(const Pixels<const S>& f, const X& x, T* s) {
  using V = Vec<T>;
  const auto some = [&]<int M>(int64_t p) {
    V acc[M];
    set_zero(acc);
    for_vectors<T>(f.channels, [&](int64_t c, int64_t left) {
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) acc[m] = acc[m] + V::load(f.pixel(p + m) + c, left) * x(p + m, c, left);
    });
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) s[p + m] += sum(acc[m]);
  };
  int64_t p = 0;
  for (; p + 4 <= f.length; p += 4) some.template operator()<4>(p);
  for (; p < f.length; ++p) some.template operator()<1>(p);
}

template <class T, class S>
void project(const Pixels<const S>& f, Rows<const T> k, Rows<T> s) {
  for (int64_t r = 0; r < k.count; ++r) {
    const T* row = k.row(r);
    dot_pixels(f, [&](int64_t, int64_t c, int64_t left) { return Vec<T>::load(row + c, left); }, s.row(r));
  }
}

template <class T, class S>
void contract(const Pixels<const S>& f, const Pixels<const S>& e, Rows<T> s) {
  for (int64_t g = 0; g < s.count; ++g)
    dot_pixels(
        f,
        [&](int64_t p, int64_t c, int64_t left) {
          return Vec<T>::load(e.pixel(p) + g * f.channels + c, left);
        },
        s.row(g));
}

template <class T, class S>
void reduce(const Pixels<const S>& f, Rows<const T> z, const T* keep, Rows<T> q) {
  using V = Vec<T>;
  for (int64_t r = 0; r < z.count; ++r) {
    const T* weights = z.row(r);
    T* to = q.row(r);
    for_vectors<T>(f.channels, [&](int64_t c, int64_t left) {
      V total(T(0));
      for (int64_t first = 0; first < f.length; first += kPixelChain) {
        V acc(T(0));
        for (int64_t p = first; p < minimum(first + kPixelChain, f.length); ++p)
          if (!masked(keep, p)) acc = acc + V::load(f.pixel(p) + c, left) * V(weights[p]);
        total = total + acc;
      }
      (V::load(to + c, left) + total).store(to + c, left);
    });
  }
}

template <class T, class S>
void scale(const Pixels<const S>& f, Rows<const T> a, const T* keep, const Pixels<S>& out) {
  using V = Vec<T>;
  for (int64_t p = 0; p < f.length; ++p)
    for (int64_t g = 0; g < a.count; ++g) {
      S* to = out.pixel(p) + g * f.channels;
      const V weight(a.row(g)[p]);
      for_vectors<T>(f.channels, [&](int64_t c, int64_t left) {
        const V found = masked(keep, p) ? V(T(0)) : V::load(f.pixel(p) + c, left) * weight;
        found.store(to + c, left);
      });
    }
}

template <class T, class S>
void expand(const Products<T> (&sums)[2], const Pixels<const S>& e, Rows<const T> a, const T* keep,
            const Pixels<S>& out) {
  using V = Vec<T>;
  for (int64_t p = 0; p < out.length; ++p)
    for_vectors<T>(out.channels, [&](int64_t c, int64_t left) {
      V found(T(0));
      if (!masked(keep, p)) {
        for (int64_t g = 0; e.data && g < a.count; ++g)
          found = found + V::load(e.pixel(p) + g * out.channels + c, left) * V(a.row(g)[p]);
        for (const Products<T>& set : sums)
          for (int64_t r = 0; r < set.k.count; ++r)
            found = found + V::load(set.k.row(r) + c, left) * V(set.z.row(r)[p]);
      }
      found.store(out.pixel(p) + c, left);
    });
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
