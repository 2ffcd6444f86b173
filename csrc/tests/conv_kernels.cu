// The kernels of the conv family on memory that is exactly as long as they may use: bounds and races for the
// sanitizers, results against plain loops.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <vector>

#include "check.h"
#include "conv/cuda/params.h"
#include "cuda_runtime.h"

using fusednn::Activation;
using fusednn::DType;
using fusednn::cuda::DepthwiseShape;

namespace {

template <class T>
constexpr DType dtype_of =
    std::is_same_v<T, float> ? DType::f32 : (std::is_same_v<T, double> ? DType::f64 : DType::f16);

// Device memory with small multiples of 1/4, which every type holds exactly; NaN where nothing was written.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size, int seed = -1) : size_(size) {
    CHECK_EQUAL(cudaMalloc(&data_, size * sizeof(T)), cudaSuccess);
    for (int64_t i = 0; seed >= 0 && i < size; ++i)
      data_[i] = T(static_cast<float>((i * 7 + seed) % 9 - 4) / 4);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  T* data() const { return data_; }
  int64_t size() const { return size_; }
  double operator[](int64_t i) const { return static_cast<double>(static_cast<float>(data_[i])); }

 private:
  int64_t size_;
  T* data_ = nullptr;
};

DepthwiseShape shape(int batch, int channels, int height, int width, int kernel, int stride, bool last,
                     int dilation = 1) {
  DepthwiseShape s{};
  s.batch = batch, s.channels = channels, s.multiplier = 1, s.height = height, s.width = width;
  s.kernel_h = s.kernel_w = kernel, s.stride_h = s.stride_w = stride, s.dilation_h = s.dilation_w = dilation;
  s.pad_top = s.pad_left = dilation * (kernel / 2);
  s.out_height = (height - 1) / stride + 1, s.out_width = (width - 1) / stride + 1;
  s.channels_last = last;
  return s;
}

int64_t at(const DepthwiseShape& s, int64_t channels, int height, int width, int n, int c, int y, int x) {
  return s.channels_last ? ((static_cast<int64_t>(n) * height + y) * width + x) * channels + c
                         : ((n * channels + c) * height + y) * width + x;
}

template <class Visit>
void each_tap(const DepthwiseShape& s, int y, int x, Visit&& visit) {
  for (int u = 0; u < s.kernel_h; ++u) {
    for (int v = 0; v < s.kernel_w; ++v) {
      const int in_y = y * s.stride_h + u * s.dilation_h - s.pad_top,
                in_x = x * s.stride_w + v * s.dilation_w - s.pad_left;
      if (in_y >= 0 && in_y < s.height && in_x >= 0 && in_x < s.width) visit(u * s.kernel_w + v, in_y, in_x);
    }
  }
}

template <class T>
double convolved(const DepthwiseShape& s, const Buffer<T>& in, const Buffer<T>& w, int n, int c, int y,
                 int x) {
  double z = 0;
  each_tap(s, y, x, [&](int tap, int in_y, int in_x) {
    z += w[c * s.kernel_h * s.kernel_w + tap] * in[at(s, s.channels, s.height, s.width, n, c, in_y, in_x)];
  });
  return z;
}

template <class Visit>
void each_output(const DepthwiseShape& s, Visit&& visit) {
  for (int n = 0; n < s.batch; ++n)
    for (int c = 0; c < s.channels; ++c)
      for (int y = 0; y < s.out_height; ++y)
        for (int x = 0; x < s.out_width; ++x) visit(n, c, y, x);
}

// Sums of a few small multiples of 1/16 are exact in float; a half result is rounded once.
template <class T>
bool close(double got, double expected) {
  return std::abs(got - expected) <= (sizeof(T) == 2 ? std::abs(expected) / 1024 : 1e-6);
}

template <class T>
void check_forward(const DepthwiseShape& s) {
  const int taps = s.kernel_h * s.kernel_w;
  const Buffer<T> in(s.batch * s.channels * s.height * s.width, 1), w(s.channels * taps, 2);
  const Buffer<T> out(s.batch * s.channels * s.out_height * s.out_width);
  CHECK_EQUAL(fusednn::cuda::depthwise_forward(
                  {dtype_of<T>, s, Activation::none, in.data(), w.data(), nullptr, out.data()}, nullptr),
              cudaSuccess);
  bool same = true;
  each_output(s, [&](int n, int c, int y, int x) {
    same = same && close<T>(out[at(s, s.channels, s.out_height, s.out_width, n, c, y, x)],
                            convolved(s, in, w, n, c, y, x));
  });
  CHECK(same);
}

template <class T>
void check_backward(const DepthwiseShape& s) {
  const int taps = s.kernel_h * s.kernel_w;
  const Buffer<T> in(s.batch * s.channels * s.height * s.width, 1), w(s.channels * taps, 2);
  const Buffer<T> d(s.batch * s.channels * s.out_height * s.out_width, 3), grad_in(in.size());
  const Buffer<T> grad_w(w.size()), grad_b(s.channels);
  const int splits = fusednn::cuda::depthwise_grad_weight_splits(s);
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Buffer<A> partials(splits * (taps + 1) * s.channels);
  CHECK_EQUAL(
      fusednn::cuda::depthwise_grad_input({dtype_of<T>, s, d.data(), w.data(), grad_in.data()}, nullptr),
      cudaSuccess);
  CHECK_EQUAL(fusednn::cuda::depthwise_grad_weight({dtype_of<T>, s, d.data(), in.data(), splits,
                                                    partials.data(), grad_w.data(), grad_b.data()},
                                                   nullptr),
              cudaSuccess);
  std::vector<double> expected_in(in.size()), expected_w(w.size()), expected_b(s.channels);
  each_output(s, [&](int n, int c, int y, int x) {
    const double g = d[at(s, s.channels, s.out_height, s.out_width, n, c, y, x)];
    expected_b[c] += g;
    each_tap(s, y, x, [&](int tap, int in_y, int in_x) {
      const int64_t i = at(s, s.channels, s.height, s.width, n, c, in_y, in_x);
      expected_in[i] += g * w[c * taps + tap];
      expected_w[c * taps + tap] += g * in[i];
    });
  });
  bool same = true;
  for (int64_t i = 0; i < in.size(); ++i) same = same && close<T>(grad_in[i], expected_in[i]);
  for (int64_t i = 0; i < w.size(); ++i) same = same && close<T>(grad_w[i], expected_w[i]);
  for (int64_t i = 0; i < s.channels; ++i) same = same && close<T>(grad_b[i], expected_b[i]);
  CHECK(same);
}

template <class T>
void check_separable(const DepthwiseShape& s, int outputs, bool tf32 = false) {
  const Buffer<T> in(s.batch * s.channels * s.height * s.width, 1),
      w(s.channels * s.kernel_h * s.kernel_w, 2);
  const int64_t pixels = static_cast<int64_t>(s.batch) * s.out_height * s.out_width;
  const Buffer<T> pointwise(outputs * s.channels, 4), bias(outputs, 5), residual(pixels * outputs, 6),
      out(pixels * outputs);
  CHECK_EQUAL(fusednn::cuda::separable_forward(
                  {dtype_of<T>, s, outputs, Activation::relu, Activation::none, in.data(), w.data(), nullptr,
                   pointwise.data(), bias.data(), residual.data(), out.data(), tf32},
                  nullptr),
              cudaSuccess);
  bool same = true;
  DepthwiseShape result = s;
  result.channels = outputs;
  each_output(result, [&](int n, int o, int y, int x) {
    const int64_t place = at(s, outputs, s.out_height, s.out_width, n, o, y, x);
    double sum = bias[o] + residual[place];
    for (int c = 0; c < s.channels; ++c)
      sum += pointwise[o * s.channels + c] * std::fmax(convolved(s, in, w, n, c, y, x), 0.0);
    same = same && close<T>(out[place], sum);
  });
  CHECK(same);
}

}  // namespace

TEST(depthwise_rows) {
  check_forward<float>(shape(2, 3, 6, 8, 3, 1, false));
  check_forward<float>(shape(1, 3, 5, 7, 5, 2, false));
  check_forward<__half>(shape(1, 2, 7, 8, 7, 2, false));
}

TEST(depthwise_columns) {
  check_forward<float>(shape(2, 12, 5, 6, 3, 1, true));
  check_forward<__half>(shape(1, 24, 5, 7, 5, 2, true));
}

TEST(depthwise_any) {
  check_forward<double>(shape(1, 3, 5, 6, 3, 1, true));
  check_forward<float>(shape(1, 8, 6, 5, 3, 3, true, 2));
  check_forward<__half>(shape(1, 3, 6, 5, 4, 1, false));
}

TEST(depthwise_gradients) {
  for (const bool last : {false, true}) {
    check_backward<float>(shape(2, 8, 6, 7, 3, 1, last));
    check_backward<__half>(shape(1, 4, 5, 6, 5, 2, last));
    check_backward<double>(shape(1, 3, 5, 6, 4, 1, last, 2));
  }
}

TEST(separable_products) {
  for (const bool last : {false, true}) {
    check_separable<float>(shape(2, 5, 5, 7, 3, 1, last), 7);
    check_separable<float>(shape(1, 40, 4, 4, 3, 2, last), 72, true);
    check_separable<__half>(shape(1, 40, 5, 8, 3, 1, last), 24);
    check_separable<__half>(shape(1, 8, 6, 6, 5, 1, last), 260);
  }
}
