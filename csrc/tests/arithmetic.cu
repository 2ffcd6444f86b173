// Sixteen-bit formats against a search through all of their values, vector types, wmma against plain
// products.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "core/cuda/launch.h"

using fusednn::cuda::launch;

namespace {

// The nearest finite value, of two equally near ones the even one; beyond the largest by half a step:
// infinity.
template <class T>
class Nearest {
 public:
  Nearest() {
    for (unsigned bits = 0; std::isfinite(at(bits)); ++bits) values_.push_back(at(bits));
    values_.push_back(2.0 * values_.back() - values_[values_.size() - 2]);
  }
  unsigned operator()(double x) const {
    const double magnitude = std::fabs(x);
    size_t low = 0, high = values_.size() - 1;
    if (magnitude >= values_[high]) return sign(x) | static_cast<unsigned>(high);
    while (high - low > 1) {
      const size_t middle = (low + high) / 2;
      (values_[middle] <= magnitude ? low : high) = middle;
    }
    const double below = magnitude - values_[low], above = values_[high] - magnitude;
    const bool up = above < below || (above == below && low % 2 == 1);
    return sign(x) | static_cast<unsigned>(up ? high : low);
  }
  double value(unsigned bits) const { return values_[bits]; }
  unsigned count() const { return static_cast<unsigned>(values_.size()); }

 private:
  static unsigned sign(double x) { return std::signbit(x) ? 0x8000u : 0u; }
  static double at(unsigned bits) {
    return static_cast<double>(static_cast<float>(T::from_bits(static_cast<uint16_t>(bits))));
  }
  std::vector<double> values_;
};

// Around every value: itself, the middle to the next, and a hair to either side of the middle.
template <class T>
int wrong_roundings() {
  const Nearest<T> nearest;
  int wrong = 0;
  for (unsigned bits = 0; bits + 1 < nearest.count(); ++bits) {
    const double low = nearest.value(bits), middle = low + (nearest.value(bits + 1) - low) / 2;
    for (double x : {low, middle, std::nextafter(middle, 0.0), std::nextafter(middle, 1e300)}) {
      wrong += T(x).bits != nearest(x);
      wrong += T(-x).bits != nearest(-x);
      wrong += T(static_cast<float>(x)).bits != nearest(static_cast<float>(x));
    }
  }
  return wrong;
}

template <class T>
void check_special(T value, float expected) {
  CHECK(static_cast<float>(value) == expected);
}

__global__ void vectors(float4* x, const uint4* bits, __half2* h) {
  float4 v = __ldg(&x[threadIdx.x]);
  v.w += static_cast<float>(bits[threadIdx.x].w);
  x[threadIdx.x] = v;
  h[threadIdx.x] = __hmul2(__floats2half2_rn(v.x, v.w), __float2half2_rn(2.0f));
}

template <class T, int M, int N, int K, class LayoutA, class LayoutB>
__global__ void product(const typename nvcuda::wmma::detail::Storage<T>::type* a,
                        const typename nvcuda::wmma::detail::Storage<T>::type* b, float* d, bool by_row) {
  using namespace nvcuda;
  wmma::fragment<wmma::matrix_a, M, N, K, T, LayoutA> fa;
  wmma::fragment<wmma::matrix_b, M, N, K, T, LayoutB> fb;
  wmma::fragment<wmma::accumulator, M, N, K, float> sum;
  wmma::fill_fragment(sum, 1.0f);
  wmma::load_matrix_sync(fa, a, std::is_same_v<LayoutA, wmma::row_major> ? K : M);
  wmma::load_matrix_sync(fb, b, std::is_same_v<LayoutB, wmma::row_major> ? N : K);
  wmma::mma_sync(sum, fa, fb, sum);
  for (int e = 0; e < sum.num_elements; ++e) sum.x[e] *= 2.0f;
  wmma::store_matrix_sync(d, sum, by_row ? N : M, by_row ? wmma::mem_row_major : wmma::mem_col_major);
}

// Small integers, so that every order of summation gives the same bits.
template <class T, int M, int N, int K, class LayoutA, class LayoutB>
void check_product(bool by_row) {
  using Value = typename nvcuda::wmma::detail::Storage<T>::type;
  constexpr bool rows_a = std::is_same_v<LayoutA, nvcuda::wmma::row_major>;
  constexpr bool rows_b = std::is_same_v<LayoutB, nvcuda::wmma::row_major>;
  alignas(32) Value a[M * K], b[K * N];
  alignas(32) float d[M * N];
  auto value_a = [](int m, int k) { return (m * 7 + k * 3) % 11 - 5; };
  auto value_b = [](int k, int n) { return (k * 5 + n * 2) % 13 - 6; };
  for (int m = 0; m < M; ++m) {
    for (int k = 0; k < K; ++k) a[rows_a ? m * K + k : k * M + m] = static_cast<Value>(float(value_a(m, k)));
  }
  for (int k = 0; k < K; ++k) {
    for (int n = 0; n < N; ++n) b[rows_b ? k * N + n : n * K + k] = static_cast<Value>(float(value_b(k, n)));
  }
  CHECK(launch(product<T, M, N, K, LayoutA, LayoutB>, 1, 32, 0, nullptr, a, b, d, by_row) == cudaSuccess);
  int wrong = 0;
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      int expected = 1;
      for (int k = 0; k < K; ++k) expected += value_a(m, k) * value_b(k, n);
      wrong += d[by_row ? m * N + n : n * M + m] != 2.0f * static_cast<float>(expected);
    }
  }
  CHECK_EQUAL(wrong, 0);
}

template <class T, int M, int N, int K>
void check_layouts() {
  using nvcuda::wmma::col_major;
  using nvcuda::wmma::row_major;
  for (bool by_row : {true, false}) {
    check_product<T, M, N, K, row_major, row_major>(by_row);
    check_product<T, M, N, K, row_major, col_major>(by_row);
    check_product<T, M, N, K, col_major, row_major>(by_row);
    check_product<T, M, N, K, col_major, col_major>(by_row);
  }
}

__global__ void loads(const __half* from, unsigned ldm) {
  nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, 16, 16, 16, __half, nvcuda::wmma::row_major> f;
  nvcuda::wmma::load_matrix_sync(f, from, ldm);
}

}  // namespace

TEST(half_rounding) {
  CHECK_EQUAL(wrong_roundings<__half>(), 0);
  check_special(__half(65519.0f), 65504.0f);
  check_special(__half(65520.0f), INFINITY);
  check_special(__half(-INFINITY), -INFINITY);
  check_special(__half(5.9604644775390625e-8f), 5.9604644775390625e-8f);
  CHECK(__half(NAN).bits == 0x7fff && std::isnan(__half2float(__half(NAN))));
  CHECK(__float2half_rn(-0.0f).bits == 0x8000);
  // By way of float this would be rounded twice, to 1.
  CHECK(__double2half(1.0 + 0x1p-11 + 0x1p-40).bits == 0x3c01);
}

TEST(bfloat_rounding) {
  CHECK_EQUAL(wrong_roundings<__nv_bfloat16>(), 0);
  check_special(__nv_bfloat16(3.392e38f), 3.3895313892515355e38f);
  check_special(__nv_bfloat16(3.4028235e38f), INFINITY);
  CHECK(__nv_bfloat16(NAN).bits == 0x7fff);
  const float2 back = __bfloat1622float2(__floats2bfloat162_rn(1.00390625f, -2.5f));
  CHECK(back.x == 1.0f && back.y == -2.5f);
}

TEST(small_float_arithmetic) {
  const __half a(1.5f), b(0.1f);
  CHECK(float(a + b) == float(__half(float(a) + float(b))) && (a - b).bits == __hsub(a, b).bits);
  CHECK(__hmax(a, b).bits == a.bits && (-a).bits == __hneg(a).bits && a > b);
  CHECK(__hfma(a, b, a).bits == __half(1.5 * double(float(b)) + 1.5).bits);
}

TEST(vector_types) {
  static_assert(alignof(float4) == 16 && sizeof(float3) == 12 && alignof(__half2) == 4 &&
                alignof(double2) == 16);
  float4 x[2] = {make_float4(1, 2, 3, 4), make_float4(5, 6, 7, 8)};
  const uint4 bits[2] = {make_uint4(0, 0, 0, 10), make_uint4(0, 0, 0, 20)};
  __half2 h[2];
  CHECK(launch(vectors, 1, 2, 0, nullptr, x, bits, h) == cudaSuccess);
  CHECK(x[1].w == 28.0f && __low2float(h[1]) == 10.0f && __high2float(h[0]) == 28.0f);
}

TEST(device_functions) {
  CHECK(__float2int_rn(2.5f) == 2 && __float2int_rz(-2.7f) == -2 && __float2int_rn(1e20f) == 2147483647);
  CHECK(__float2int_rn(-1e20f) == -2147483647 - 1 && __float2uint_rn(1e20f) == 4294967295u &&
        __float2int_rn(NAN) == 0);
  CHECK(__popc(0xf0u) == 4 && __clz(1) == 31 && __ffs(8) == 4 && __brev(1u) == 0x80000000u);
  CHECK(__umulhi(0x80000000u, 6u) == 3u && __funnelshift_l(0x80000000u, 1u, 1) == 3u);
  CHECK(__byte_perm(0x33221100u, 0x77665544u, 0x7610u) == 0x77661100u);
  CHECK(max(1, 2u) == 2 && min(1.0f, -2.0f) == -2.0f && __float_as_uint(1.0f) == 0x3f800000u);
  CHECK(std::isnan(max(NAN, NAN)) && max(NAN, 1.0f) == 1.0f && rsqrtf(4.0f) == 0.5f);
}

TEST(wmma_products) {
  check_layouts<__half, 16, 16, 16>();
  check_layouts<__nv_bfloat16, 16, 16, 16>();
  check_layouts<__half, 32, 8, 16>();
  check_layouts<__half, 8, 32, 16>();
  check_layouts<nvcuda::wmma::precision::tf32, 16, 16, 8>();
}

TEST(wmma_preconditions) {
  alignas(32) __half x[17 * 16] = {};
  CHECK(launch(loads, 1, 32, 0, nullptr, x, 16u) == cudaSuccess);
  CHECK(launch(loads, 1, 32, 0, nullptr, x + 8, 16u) == cudaErrorLaunchFailure);
  CHECK(launch(loads, 1, 32, 0, nullptr, x, 17u) == cudaErrorLaunchFailure);
  CHECK(launch(loads, 1, 16, 0, nullptr, x, 16u) == cudaErrorLaunchFailure);
}

TEST(tf32_rounding) {
  CHECK(nvcuda::wmma::__float_to_tf32(1.0f + 0x1p-11f) == 1.0f + 0x1p-10f);
  CHECK(nvcuda::wmma::__float_to_tf32(1.0f + 0x1p-12f) == 1.0f);
}
