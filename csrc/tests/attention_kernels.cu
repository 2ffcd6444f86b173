// The kernels of attention on memory that is exactly as long as they may use: bounds and races for the
// sanitizers; weights and outputs that sum to what the softmax says. tests/attention has the numbers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "attention/cuda/params.h"
#include "attention/philox.h"
#include "check.h"
#include "cuda_runtime.h"
#include "in_order.h"

namespace attention = fusednn::cuda::attention;
using fusednn::DType;

namespace {

template <class T>
constexpr DType dtype_of = std::is_same_v<T, float>    ? DType::f32
                           : std::is_same_v<T, double> ? DType::f64
                           : std::is_same_v<T, __half> ? DType::f16
                                                       : DType::bf16;
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Device memory of exactly `size` elements; NaN where nothing was written.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size) {
    CHECK_EQUAL(cudaMalloc(&data_, size * sizeof(T)), cudaSuccess);
  }
  Buffer(int64_t size, float value) : Buffer(size) {
    for (int64_t i = 0; i < size; ++i) data_[i] = T(value);
  }
  // Small multiples of 1/8.
  Buffer(int64_t size, int seed) : Buffer(size) {
    for (int64_t i = 0; i < size; ++i) data_[i] = T(static_cast<float>((i * 7 + seed) % 9 - 4) / 8);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  T* data() const { return data_; }
  int64_t size() const { return size_; }
  double sum(int64_t begin, int64_t count) const {
    double sum = 0;
    for (int64_t i = begin; i < begin + count; ++i) sum += static_cast<double>(static_cast<float>(data_[i]));
    return sum;
  }

 private:
  int64_t size_;
  T* data_ = nullptr;
};

template <class T>
bool near(double got, double expected) {
  return std::abs(got - expected) <= (sizeof(T) == 2 ? 1e-2 : 1e-5) * std::max(1.0, std::abs(expected));
}

struct Sizes {
  int batch, heads, key_heads, queries, keys, head_size, value_size, extra;
};

attention::Strides dense(int64_t heads, int64_t rows, int64_t columns) {
  return {heads * rows * columns, rows * columns, columns, 1};
}

// Values of 1: a row's output is 1, or 0 if it keeps nothing, whatever its weights are, and they sum to that.
template <class T>
void check_attention(const Sizes& s, int splits, bool masked, int64_t window_left = -1) {
  using A = Wide<T>;
  const int64_t B = s.batch, H = s.heads, G = s.key_heads, L = s.queries, S = s.keys, X = s.extra;
  const int64_t D = s.head_size, V = s.value_size, rows = B * H * L;
  const Buffer<T> q(B * H * L * D, 1), k(B * G * S * D, 2), v(B * G * S * V, 1.0f);
  const Buffer<T> extra_key(G * X * D, 3), extra_value(G * X * V, 1.0f), added(B * S, 4);
  const Buffer<bool> mask(L * S, true);
  const Buffer<float> slopes(H, 0.25f);
  // Even columns of the first row are hidden, and all of the last row's.
  for (int64_t j = 0; j < S; ++j) mask.data()[j] = j % 2 == 1, mask.data()[(L - 1) * S + j] = false;
  attention::Call call{};
  call.dtype = dtype_of<T>;
  call.batch = B, call.queries = call.total_queries = L, call.keys = call.total_keys = S;
  call.heads = s.heads, call.key_heads = s.key_heads, call.head_size = s.head_size;
  call.value_size = s.value_size, call.extra = s.extra;
  const auto packs = [](int64_t size) { return size * sizeof(T) % 16 == 0; };
  call.query = {q.data(), dense(H, L, D), packs(D)};
  call.key = {k.data(), dense(G, S, D), packs(D)};
  call.value = {v.data(), dense(G, S, V), packs(V)};
  if (masked) {
    call.mask = mask.data(), call.mask_is_bool = true, call.mask_strides = {0, 0, S, 1};
    call.key_mask = added.data(), call.key_mask_batch = S, call.key_mask_column = 1;
    call.alibi_slopes = slopes.data();
  }
  call.extra_key = extra_key.data(), call.extra_value = extra_value.data();
  call.scale = 0.5, call.softcap = masked ? 2 : 0;
  call.window_left = window_left, call.window_right = window_left, call.position_offset = S - L;

  const Buffer<T> output(rows * V);
  const Buffer<A> lse(rows), softmax(rows * 2);
  const Buffer<A> sums(splits > 1 ? splits * rows * V : 0), stats(splits > 1 ? splits * rows * 2 : 0);
  CHECK_EQUAL(
      attention::forward({call, splits, output.data(), lse.data(), softmax.data(), sums.data(), stats.data()},
                         nullptr),
      cudaSuccess);
  const auto kept = [&](int64_t i) { return X > 0 || !masked || i < L - 1; };
  for (int64_t i = 0; i < rows; ++i) {  // [B, L, H]
    CHECK(near<T>(output.sum(i * V, V), kept(i / H % L) ? static_cast<double>(V) : 0));
    CHECK(std::isinf(lse.data()[i]) == !kept(i % L));
  }
  for (const bool mean : {true, false}) {
    const int64_t weight_rows = mean ? B * L : rows;
    const Buffer<T> weights(weight_rows * (S + X));
    CHECK_EQUAL(attention::weights({call, softmax.data(), mean, weights.data()}, nullptr), cudaSuccess);
    for (int64_t i = 0; i < weight_rows; ++i)
      CHECK(near<T>(weights.sum(i * (S + X), S + X), kept(i % L) ? 1 : 0));
  }
}

// Two sequences and an empty one; rows behind them are nobody's.
template <class T>
void check_packed(int splits) {
  using A = Wide<T>;
  const int64_t H = 2, D = 8, T_q = 8, T_k = 310;
  const Buffer<T> q(T_q * H * D, 1), k(T_k * D, 2), v(T_k * D, 1.0f), output(T_q * H * D, 7.0f);
  const Buffer<int32_t> of_queries(4), of_keys(4);
  const int32_t ends_q[] = {0, 5, 5, 7}, ends_k[] = {0, 300, 300, 310};
  std::memcpy(of_queries.data(), ends_q, sizeof(ends_q));
  std::memcpy(of_keys.data(), ends_k, sizeof(ends_k));
  const Buffer<A> lse(T_q * H, 7.0f), sums(splits * T_q * H * D), stats(splits * T_q * H * 2, 0.0f);
  attention::Call call{};
  call.dtype = dtype_of<T>;
  call.batch = 3, call.queries = 5, call.keys = 300, call.total_queries = T_q, call.total_keys = T_k;
  call.heads = 2, call.key_heads = 1, call.head_size = call.value_size = 8;
  call.query = {q.data(), {0, D, H * D, 1}, true};
  call.key = {k.data(), {0, 0, D, 1}, true}, call.value = {v.data(), {0, 0, D, 1}, true};
  call.cu_seqlens_q = of_queries.data(), call.cu_seqlens_k = of_keys.data();
  call.scale = 0.5, call.window_left = call.window_right = -1;
  CHECK_EQUAL(attention::forward(
                  {call, splits, output.data(), lse.data(), nullptr, sums.data(), stats.data()}, nullptr),
              cudaSuccess);
  for (int64_t i = 0; i < T_q * H; ++i) {
    const double expected = i < 7 * H ? D : (splits > 1 ? 0 : 7 * D);
    CHECK(near<T>(output.sum(i * D, D), expected));
  }
}

template <class T>
void check_sizes() {
  check_attention<T>({2, 4, 2, 3, 300, 16, 24, 2}, 1, true);
  check_attention<T>({1, 3, 1, 5, 129, 7, 9, 1}, 1, true);
  check_attention<T>({1, 2, 2, 1, 700, 8, 8, 0}, 3, false);
  check_attention<T>({1, 2, 1, 2, 515, 40, 5, 2}, 4, true);
  check_attention<T>({1, 1, 1, 70, 131, 16, 16, 0}, 2, false, 20);
  check_attention<T>({1, 1, 1, 2, 3, 256, 256, 0}, 1, false);
  check_packed<T>(1);
  check_packed<T>(3);
}

void check_all() {
  check_sizes<float>();
  check_sizes<__half>();
  check_sizes<__nv_bfloat16>();
  check_sizes<double>();
}

}  // namespace

TEST(attention_forward_and_weights) { check_all(); }

TEST(attention_in_other_orders) {
  const InOrder reverse(cuda_on_cpu::Order::reverse);
  check_attention<float>({1, 2, 1, 2, 515, 40, 5, 2}, 4, true);
  const InOrder random(cuda_on_cpu::Order::random, 7);
  check_attention<__half>({1, 2, 1, 2, 515, 40, 5, 2}, 4, true);
}

TEST(attention_refuses) {
  attention::Weights packed{};
  const int32_t ends[] = {0};
  packed.call.cu_seqlens_q = packed.call.cu_seqlens_k = ends;
  CHECK_EQUAL(attention::weights(packed, nullptr), cudaErrorInvalidValue);
  attention::Forward large{};
  large.call.dtype = DType::f32, large.splits = 1;
  large.call.heads = large.call.key_heads = 1, large.call.batch = int64_t{1} << 31, large.call.queries = 1;
  CHECK_EQUAL(attention::forward(large, nullptr), cudaErrorInvalidValue);
}

// Known answers of the authors' library (kat_vectors of Random123).
TEST(philox) {
  const auto is = [](const fusednn::math::Philox& got, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return got.words[0] == a && got.words[1] == b && got.words[2] == c && got.words[3] == d;
  };
  using fusednn::math::philox4x32;
  const uint32_t ones = 0xffffffffu;
  CHECK(is(philox4x32(0, 0, 0, 0, 0), 0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u));
  CHECK(is(philox4x32(~uint64_t{0}, ones, ones, ones, ones), 0x408f276du, 0x41c83b0eu, 0xa20bc7c6u,
           0x6d5451fdu));
  CHECK(is(philox4x32(uint64_t{0x299f31d0} << 32 | 0xa4093822u, 0x243f6a88u, 0x85a308d3u, 0x13198a2eu,
                      0x03707344u),
           0xd16cfe09u, 0x94fdcceb, 0x5001e420u, 0x24126ea1u));
  CHECK_EQUAL(fusednn::math::dropout_threshold(0.5), 0x80000000u);
  CHECK_EQUAL(fusednn::math::dropout_threshold(1.0), ones);
  CHECK_EQUAL(fusednn::math::dropout_scale(1.0), 0.0);
}
