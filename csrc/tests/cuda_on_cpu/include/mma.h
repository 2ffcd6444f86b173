// Stand-in for the toolkit's header: nvcuda::wmma with float accumulation in order of k, and double.
//
// Element e of lane l is number 32 e + l of the row-major matrix; CUDA leaves this open, and kernels that
// count on the hardware's order fail here.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

namespace precision {
struct tf32 {};
}  // namespace precision

namespace detail {

template <class T>
struct Storage {
  using type = T;
};
template <>
struct Storage<precision::tf32> {
  using type = float;
};

template <class Use, int M, int N, int K>
struct Extent {
  static constexpr int rows = std::is_same_v<Use, matrix_b> ? K : M;
  static constexpr int columns = std::is_same_v<Use, matrix_a> ? K : N;
};

// What the multiplier reads: of a float that was never rounded to tf32, the upper 19 bits.
template <class T, class Compute>
Compute operand(typename Storage<T>::type x) {
  if constexpr (std::is_same_v<T, precision::tf32>) {
    return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & ~0x1fffu);
  } else {
    return static_cast<Compute>(x);
  }
}

template <class T>
void check_address(const T* address, unsigned ldm) {
  if (reinterpret_cast<uintptr_t>(address) % 32 != 0)
    cuda_on_cpu::fail("wmma: the address is not a multiple of 32 bytes");
  if (ldm * sizeof(T) % 16 != 0)
    cuda_on_cpu::fail("wmma: the leading dimension is not a multiple of 16 bytes");
}

inline void converge(const char* name, const char* file, int line) {
  const uint64_t nothing = 0;
  uint64_t all[32];
  cuda_on_cpu::exchange(name, cuda_on_cpu::full_mask, &nothing, all, sizeof(nothing), {file, line});
}

template <class Fragment>
size_t offset(int e, bool by_row, unsigned ldm) {
  const size_t i = static_cast<size_t>(e) * 32 + cuda_on_cpu::lane();
  const size_t row = i / Fragment::columns, column = i % Fragment::columns;
  return by_row ? row * ldm + column : column * ldm + row;
}

}  // namespace detail

template <class Use, int M, int N, int K, class T, class Layout = void>
struct fragment : detail::Extent<Use, M, N, K> {
  using Extent = detail::Extent<Use, M, N, K>;
  using element_type = typename detail::Storage<T>::type;
  using storage_element_type = element_type;
  static constexpr int num_elements = Extent::rows * Extent::columns / 32;
  static constexpr int num_storage_elements = num_elements;
  element_type x[num_elements];
};

template <class Use, int M, int N, int K, class T, class Layout>
void fill_fragment(fragment<Use, M, N, K, T, Layout>& f,
                   const typename fragment<Use, M, N, K, T, Layout>::element_type& value) {
  for (auto& element : f.x) element = value;
}

template <class Use, int M, int N, int K, class T, class Layout>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& f, const typename detail::Storage<T>::type* from,
                      unsigned ldm, CUDA_ON_CPU_CALLER) {
  using Fragment = fragment<Use, M, N, K, T, Layout>;
  detail::check_address(from, ldm);
  detail::converge("load_matrix_sync", file, line);
  constexpr bool by_row = std::is_same_v<Layout, row_major>;
  for (int e = 0; e < Fragment::num_elements; ++e) f.x[e] = from[detail::offset<Fragment>(e, by_row, ldm)];
}

template <int M, int N, int K, class T>
void load_matrix_sync(fragment<accumulator, M, N, K, T>& f, const T* from, unsigned ldm, layout_t layout,
                      CUDA_ON_CPU_CALLER) {
  using Fragment = fragment<accumulator, M, N, K, T>;
  detail::check_address(from, ldm);
  detail::converge("load_matrix_sync", file, line);
  for (int e = 0; e < Fragment::num_elements; ++e) {
    f.x[e] = from[detail::offset<Fragment>(e, layout == mem_row_major, ldm)];
  }
}

template <int M, int N, int K, class T>
void store_matrix_sync(T* to, const fragment<accumulator, M, N, K, T>& f, unsigned ldm, layout_t layout,
                       CUDA_ON_CPU_CALLER) {
  using Fragment = fragment<accumulator, M, N, K, T>;
  detail::check_address(to, ldm);
  detail::converge("store_matrix_sync", file, line);
  for (int e = 0; e < Fragment::num_elements; ++e) {
    to[detail::offset<Fragment>(e, layout == mem_row_major, ldm)] = f.x[e];
  }
}

template <int M, int N, int K, class T, class LayoutA, class LayoutB, class TD, class TC>
void mma_sync(fragment<accumulator, M, N, K, TD>& d, const fragment<matrix_a, M, N, K, T, LayoutA>& a,
              const fragment<matrix_b, M, N, K, T, LayoutB>& b, const fragment<accumulator, M, N, K, TC>& c,
              bool = false, CUDA_ON_CPU_CALLER) {
  using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
  struct alignas(8) Operands {
    Compute a[M * K / 32], b[K * N / 32];
  };
  Operands mine, all[32];
  for (int e = 0; e < M * K / 32; ++e) mine.a[e] = detail::operand<T, Compute>(a.x[e]);
  for (int e = 0; e < K * N / 32; ++e) mine.b[e] = detail::operand<T, Compute>(b.x[e]);
  static_assert(sizeof(Operands) <= cuda_on_cpu::max_payload);
  cuda_on_cpu::exchange("mma_sync", cuda_on_cpu::full_mask, &mine, all, sizeof(Operands), {file, line});
  for (int e = 0; e < M * N / 32; ++e) {
    const int own = e * 32 + static_cast<int>(cuda_on_cpu::lane());
    Compute sum = static_cast<Compute>(c.x[e]);
    for (int k = 0; k < K; ++k) {
      const int i = own / N * K + k, j = k * N + own % N;
      sum += all[i % 32].a[i / 32] * all[j % 32].b[j / 32];
    }
    d.x[e] = static_cast<TD>(sum);
  }
}

// To nearest, ties away from zero.
inline float __float_to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return x;
  return std::bit_cast<float>((bits + 0x1000u) & ~0x1fffu);
}

}  // namespace nvcuda::wmma
