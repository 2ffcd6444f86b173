// A SIMD vector as wide as the instruction set's registers, on the compiler's vector extension: the same text
// serves SSE2, AVX2, AVX-512 and, elsewhere, whatever the compiler makes of 16 bytes.
#pragma once

#include "core/cpu/integer.h"
#include "core/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fusednn::cpu::FUSEDNN_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The compiler's vector types, spelt out since it drops the attribute where the element is a parameter.
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Native __attribute__((vector_size(FUSEDNN_VECTOR_BYTES)));
  typedef int32_t NativeInt __attribute__((vector_size(FUSEDNN_VECTOR_BYTES)));
  typedef uint16_t Narrow __attribute__((vector_size(FUSEDNN_VECTOR_BYTES / 2)));
};
template <>
struct VectorOf<double> {
  typedef double Native __attribute__((vector_size(FUSEDNN_VECTOR_BYTES)));
  typedef int64_t NativeInt __attribute__((vector_size(FUSEDNN_VECTOR_BYTES)));
};

// T is float or double.
template <class T>
struct Vec {
  static constexpr int size = FUSEDNN_VECTOR_BYTES / sizeof(T);
  using Native = typename VectorOf<T>::Native;
  using NativeInt = typename VectorOf<T>::NativeInt;

  Native v;

  Vec() = default;
  FUSEDNN_INLINE Vec(Native native) : v(native) {}
  FUSEDNN_INLINE explicit Vec(T scalar) : v(scalar - Native{}) {}  // x - 0 is x, for -0 too

  static FUSEDNN_INLINE Vec load(const T* p) {
    Vec r;
    std::memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  FUSEDNN_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof(v)); }
  // Past the caches, to memory that nobody reads soon; p is a multiple of the vector. stream_fence() follows.
  FUSEDNN_INLINE void stream(T* p) const;

  static FUSEDNN_INLINE Vec load(const BFloat16* p) {
    typename VectorOf<T>::Narrow n;
    std::memcpy(&n, p, sizeof(n));
    return Vec((Native)(__builtin_convertvector(n, NativeInt) << 16));
  }
  static FUSEDNN_INLINE Vec load(const Half* p);

  // The first n elements; the others are zero and their memory is not touched.
  template <class S>
  static FUSEDNN_INLINE Vec load(const S* p, int64_t n) {
    if (n >= size) return load(p);
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) return Vec((Native)_mm512_maskz_loadu_ps((1u << n) - 1, p));
    if constexpr (sizeof(S) == 8) return Vec((Native)_mm512_maskz_loadu_pd((1u << n) - 1, p));
#endif
    S buffer[size];
    std::memset(buffer, 0, sizeof(buffer));
    std::memcpy(buffer, p, n * sizeof(S));
    return load(buffer);
  }
  template <class S>
  FUSEDNN_INLINE void store(S* p, int64_t n) const {
    if (n >= size) return store(p);
#if defined(__AVX512F__)
    if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
    if constexpr (sizeof(S) == 8) return _mm512_mask_storeu_pd(p, (1u << n) - 1, (__m512d)v);
#endif
    S buffer[size];
    store(buffer);
    std::memcpy(p, buffer, n * sizeof(S));
  }
  FUSEDNN_INLINE void store(BFloat16* p) const;
  FUSEDNN_INLINE void store(Half* p) const;

  FUSEDNN_INLINE NativeInt bits() const { return (NativeInt)v; }

  friend FUSEDNN_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
  friend FUSEDNN_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
  friend FUSEDNN_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
  friend FUSEDNN_INLINE Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
  friend FUSEDNN_INLINE Vec operator&(Vec a, Vec b) { return Vec((Native)(a.bits() & b.bits())); }
  friend FUSEDNN_INLINE Vec operator|(Vec a, Vec b) { return Vec((Native)(a.bits() | b.bits())); }
  friend FUSEDNN_INLINE NativeInt operator<(Vec a, Vec b) { return a.v < b.v; }
  friend FUSEDNN_INLINE NativeInt operator>(Vec a, Vec b) { return a.v > b.v; }
  friend FUSEDNN_INLINE Vec select(NativeInt mask, Vec a, Vec b) {
    return Vec((Native)((mask & (NativeInt)a.v) | (~mask & (NativeInt)b.v)));
  }
  friend FUSEDNN_INLINE T sum(Vec a) {
    T parts[size];
    a.store(parts);
    for (int width = size / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    return parts[0];
  }
};

FUSEDNN_INLINE float widen(float x) { return x; }
FUSEDNN_INLINE double widen(double x) { return x; }
FUSEDNN_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float r;
  std::memcpy(&r, &bits, sizeof(r));
  return r;
}
FUSEDNN_INLINE float widen(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // The exponent field moves up by 13 bits and is re-biased by a product, which also scales subnormals.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float r;
  std::memcpy(&r, &magnitude, sizeof(r));
  r *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &r, sizeof(bits));
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000u;  // inf and NaN
  bits |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&r, &bits, sizeof(r));
  return r;
#endif
}

FUSEDNN_INLINE void narrow(float x, float* out) { *out = x; }
FUSEDNN_INLINE void narrow(double x, double* out) { *out = x; }
FUSEDNN_INLINE void narrow(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? 0x7fc0 : static_cast<uint16_t>(rounded >> 16);
}
FUSEDNN_INLINE void narrow(float x, Half* out) {
#if defined(__F16C__)
  out->bits = _cvtss_sh(x, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint16_t r;
  if (magnitude > 0x7f800000u) {
    r = 0x7e00;
  } else if (magnitude >= 0x47800000u) {  // 2^16 and above
    r = 0x7c00;
  } else if (magnitude < 0x38800000u) {  // below the normals: adding 0.5 rounds at the subnormals' last bit
    float f;
    std::memcpy(&f, &magnitude, sizeof(f));
    f += 0.5f;
    uint32_t shifted;
    std::memcpy(&shifted, &f, sizeof(shifted));
    r = static_cast<uint16_t>(shifted - 0x3f000000u);
  } else {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    r = static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
  }
  out->bits = sign | r;
#endif
}

template <class T>
FUSEDNN_INLINE Vec<T> Vec<T>::load(const Half* p) {
  float wide[size];
#if defined(__F16C__)
  if constexpr (sizeof(T) == 4) {
    for (int i = 0; i < size; i += 8) {
      __m128i halves;
      std::memcpy(&halves, p + i, sizeof(halves));
      const __m256 floats = _mm256_cvtph_ps(halves);
      std::memcpy(wide + i, &floats, sizeof(floats));
    }
  }
#else
  for (int i = 0; i < size; ++i) wide[i] = widen(p[i]);
#endif
  Vec r;
  std::memcpy(&r.v, wide, sizeof(r.v));
  return r;
}

template <class T>
FUSEDNN_INLINE void Vec<T>::store(BFloat16* p) const {
  using Narrow = typename VectorOf<T>::Narrow;
  const NativeInt b = bits();
  const NativeInt rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  const NativeInt nan = (b & 0x7fffffff) > 0x7f800000;
  const Narrow out = __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), Narrow);
  std::memcpy(p, &out, sizeof(out));
}

template <class T>
FUSEDNN_INLINE void Vec<T>::store(Half* p) const {
  float wide[size];
  std::memcpy(wide, &v, sizeof(v));
#if defined(__F16C__)
  for (int i = 0; i < size; i += 8) {
    __m256 floats;
    std::memcpy(&floats, wide + i, sizeof(floats));
    const __m128i halves = _mm256_cvtps_ph(floats, 0);
    std::memcpy(p + i, &halves, sizeof(halves));
  }
#else
  for (int i = 0; i < size; ++i) narrow(wide[i], p + i);
#endif
}

template <class T>
FUSEDNN_INLINE void Vec<T>::stream(T* p) const {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
#else
  store(p);
#endif
}

// x, loaded once: without this the compiler may load it anew for each product that it takes part in.
template <class T>
FUSEDNN_INLINE Vec<T> in_register(Vec<T> x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x.v));
#elif defined(__x86_64__)
  asm("" : "+x"(x.v));
#endif
  return x;
}

// Makes what this thread has streamed visible to those that wait for it.
FUSEDNN_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <class T>
FUSEDNN_INLINE const T* typed(const void* p, int64_t offset = 0) {
  return p ? static_cast<const T*>(p) + offset : nullptr;
}
template <class T>
FUSEDNN_INLINE T* typed(void* p, int64_t offset = 0) {
  return p ? static_cast<T*>(p) + offset : nullptr;
}

template <class T, class S>
FUSEDNN_INLINE Vec<T> load_or_zero(const S* p, int64_t i, int64_t n) {
  return p ? Vec<T>::load(p + i, n) : Vec<T>(T(0));
}

// Accumulators, one by one: an initialised array would be written to memory first.
template <int V, class T>
FUSEDNN_INLINE void set_zero(Vec<T> (&acc)[V]) {
#pragma GCC unroll 24
  for (int v = 0; v < V; ++v) acc[v] = Vec<T>(T(0));
}
template <int M, int V, class T>
FUSEDNN_INLINE void set_zero(Vec<T> (&acc)[M][V]) {
#pragma GCC unroll 24
  for (int m = 0; m < M; ++m) set_zero(acc[m]);
}

// n rounded up to whole vectors.
template <class T>
constexpr int64_t padded(int64_t n) {
  return ceil_div(n, Vec<T>::size) * Vec<T>::size;
}

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());
template <class T>
constexpr T kLargest = static_cast<T>(sizeof(T) == 4 ? __FLT_MAX__ : __DBL_MAX__);

// The accumulator of a storage type.
template <class S>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
