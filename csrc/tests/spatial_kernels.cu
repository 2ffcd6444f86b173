// The kernels of the spatial family on memory that is exactly as long as they may use: bounds and races for
// the sanitizers; maps that sum to 1, and gradients of scores that sum to 0. tests/spatial has the numbers.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <string>
#include <type_traits>

#include "check.h"
#include "cuda_runtime.h"
#include "recurrence/cuda/params.h"
#include "spatial/cuda/params.h"

using namespace fusednn::cuda;
using fusednn::DType;

namespace {

template <class T>
constexpr DType dtype_of =
    std::is_same_v<T, float> ? DType::f32 : (std::is_same_v<T, double> ? DType::f64 : DType::f16);
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Device memory with small multiples of 1/8; NaN where nothing was written.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size, int seed = -1) : size_(size) {
    CHECK_EQUAL(cudaMalloc(&data_, size * sizeof(T)), cudaSuccess);
    for (int64_t i = 0; i < size; ++i)
      data_[i] = T(seed < 0 ? NAN : static_cast<float>((i * 7 + seed) % 9 - 4) / 8);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  T* data() const { return data_; }
  double sum(int64_t begin, int64_t count) const {
    double sum = 0;
    for (int64_t i = begin; i < begin + count; ++i) sum += static_cast<double>(static_cast<float>(data_[i]));
    return sum;
  }
  bool finite() const { return std::isfinite(sum(0, size_)); }

 private:
  int64_t size_;
  T* data_ = nullptr;
};

template <class T>
bool near(double got, double expected) {
  return std::abs(got - expected) <= (sizeof(T) == 2 ? 1e-2 : 1e-5);
}

template <class T>
void check_attention(AttentionShape s, AttentionOutput output, int splits = 0) {
  using A = Wide<T>;
  const int64_t N = s.batch, C = s.channels, P = s.positions(), G = s.maps, K = s.rows;
  const Buffer<T> features(N * C * P, 1), weight(K * C, 2), term(s.additive ? N * K : N * G * P, 3);
  const Buffer<T> v(G * K, 4), grad_map(N * G * P, 5), map(N * G * P);
  const int64_t sizes[] = {N * G * C * P, N * G * C * P, N * G * C, N * G * 2};
  const int64_t size = sizes[static_cast<int>(output)];
  const Buffer<T> attended(size), grad(size, 6);
  AttentionCall call{dtype_of<T>,
                     s,
                     output,
                     features.data(),
                     weight.data(),
                     term.data(),
                     s.additive ? v.data() : nullptr,
                     nullptr,
                     nullptr,
                     0.5,
                     0};
  call.splits = splits ? splits : attention_splits(s, call.dtype);
  const int64_t parts = N * call.splits;
  const Buffer<A> weights(N * G * P), stats(parts * G * 2), sums(parts * G * std::max<int64_t>(C, 2));
  CHECK_EQUAL(attention_forward(
                  {call, attended.data(), map.data(), weights.data(), stats.data(), sums.data()}, nullptr),
              cudaSuccess);
  CHECK(attended.finite());
  for (int64_t i = 0; i < N * G; ++i) CHECK(near<T>(map.sum(i * P, P), 1));

  const int64_t blocks = attention_backward_blocks(s, call.splits) * call.splits;
  const Buffer<T> grad_features(N * C * P), grad_term(N * G * P), grad_weight(K * C);
  const Buffer<A> d_scores(N * G * P), d_energy(N * K * P), d_stats(parts * G * 2), of_weight(blocks * K * C),
      of_v(blocks * G * K), of_term(parts * K), of_temperature(blocks);
  AttentionBackward p{};
  p.call = call;
  p.grad_attended = grad.data(), p.grad_map = grad_map.data(), p.map = map.data();
  p.grad_features = grad_features.data(), p.grad_term = s.additive ? nullptr : grad_term.data();
  p.blocks = static_cast<int>(blocks / call.splits);
  p.d_scores = d_scores.data(), p.d_energy = s.additive ? d_energy.data() : nullptr, p.stats = d_stats.data();
  p.weight_partials = of_weight.data(), p.temperature_partials = of_temperature.data();
  if (s.additive) p.v_partials = of_v.data(), p.term_partials = of_term.data();
  CHECK_EQUAL(attention_backward(p, nullptr), cudaSuccess);
  CHECK_EQUAL(add_partials({of_weight.data(), 1, blocks, K * C, call.dtype, grad_weight.data()}, nullptr),
              cudaSuccess);
  CHECK(grad_features.finite() && grad_weight.finite() && of_temperature.finite());
  for (int64_t i = 0; i < N * G; ++i) CHECK(near<T>(d_scores.sum(i * P, P), 0));
}

void check_options(int splits, int batch, int height, int width) {
  for (const bool last : {false, true}) {
    for (const bool additive : {false, true}) {
      const AttentionShape s{batch, 9, height, width, 2, additive ? 5 : 2, additive, last};
      check_attention<float>(s, AttentionOutput::scale, splits);
      check_attention<__half>(s, AttentionOutput::sum, splits);
      check_attention<double>(s, AttentionOutput::coordinates, splits);
    }
  }
  const AttentionShape even{batch, 16, height, 4, 1, 1, false, true};
  check_attention<float>(even, AttentionOutput::flatten, splits);
}

// A sequence of each length, forward and backward.
template <class T>
void check_recurrence(CellInput input, bool lstm, bool additive, bool last, int H, int P) {
  using A = Wide<T>;
  const int B = 2, steps = 3, C = 6, K = additive ? 5 : 1;
  Buffer<int64_t> lengths(B, 0);
  lengths.data()[0] = 3, lengths.data()[1] = 2;
  AttentionLstm q{};
  q.dtype = dtype_of<T>, q.input = input, q.lstm = lstm, q.additive = additive, q.channels_last = last;
  q.batch = B, q.steps = steps, q.channels = C, q.positions = P, q.hidden_size = H, q.energies = K;
  q.lengths = lengths.data(), q.temperature = 0.5;
  const int J = q.gate_rows(), Q = q.terms(), frames = B * steps;
  const Buffer<T> features(frames * C * P, 1), v(K, 2), weight(H * (J + Q), 3), weight_ih(C * J, 4);
  const Buffer<T> bias_ih(J, 5), bias_hh(J, 6), hidden_bias(Q, 7), grad_hidden(frames * H, 8),
      grad_maps(frames * P, 1), h0(B * H, 2), c0(B * H, 3);
  const Buffer<A> products(frames * K * P, 4), projected(int64_t{P} * frames * J, 5), h(B * H, 2),
      c(B * H, 3);
  const Buffer<A> attended(B * C * P, 6), x(B * J, 7), r(B * J), terms(frames * K, 8);
  const Buffer<T> hidden(frames * H, 0), maps(frames * P, 0);
  const Buffer<A> gates(frames * 4 * H), cells(frames * H);
  q.features = features.data(), q.products = products.data(), q.v = v.data();
  q.projected = projected.data(), q.frame_stride = J, q.position_stride = int64_t{frames} * J;
  const auto each_launch = [&](auto&& launch, bool reverse) {
    if (input != CellInput::between) return launch(0, steps);
    for (int t = 0; t <= steps; ++t) {
      const int first = reverse ? steps - t : t;
      launch(first, first + 1);
    }
  };
  AttentionLstmForward f{q,
                         weight.data(),
                         weight_ih.data(),
                         bias_ih.data(),
                         bias_hh.data(),
                         hidden_bias.data(),
                         h.data(),
                         lstm ? c.data() : nullptr,
                         hidden.data(),
                         maps.data(),
                         gates.data(),
                         lstm ? cells.data() : nullptr,
                         attended.data(),
                         x.data(),
                         r.data()};
  each_launch(
      [&](int first, int end) {
        f.q.first = first, f.q.last = end;
        CHECK_EQUAL(attention_lstm_forward(f, nullptr), cudaSuccess);
      },
      false);
  CHECK(h.finite());
  for (const int frame : {0, 1, 2, 3, 4}) CHECK(near<T>(maps.sum(frame * P, P), 1));

  const Buffer<A> d_h(B * H, 1), d_c(B * H, 2), d_x(frames * J), d_r(frames * J), d_scaled(frames * P);
  const Buffer<A> d_products(frames * K * P), d_terms(frames * K), d_v(frames * K);
  AttentionLstmBackward b{};
  b.q = q, b.weight = weight.data(), b.weight_ih = weight_ih.data();
  b.h0 = h0.data(), b.c0 = lstm ? c0.data() : nullptr, b.hidden = hidden.data(), b.maps = maps.data();
  b.gates = gates.data(), b.cells = lstm ? cells.data() : nullptr;
  b.grad_hidden = grad_hidden.data(), b.grad_maps = grad_maps.data(), b.terms = terms.data();
  b.d_attended = attended.data(), b.d_h = d_h.data(), b.d_c = lstm ? d_c.data() : nullptr;
  b.d_x = d_x.data(), b.d_r = lstm ? nullptr : d_r.data(), b.d_scaled = d_scaled.data();
  b.d_products = d_products.data(), b.d_terms = d_terms.data(), b.d_v = d_v.data();
  each_launch(
      [&](int first, int end) {
        b.q.first = first, b.q.last = end;
        CHECK_EQUAL(attention_lstm_backward(b, nullptr), cudaSuccess);
      },
      true);
  CHECK(d_h.finite());
  for (const int frame : {0, 1, 2, 3, 4}) CHECK(near<T>(d_scaled.sum(frame * P, P), 0));
}

}  // namespace

TEST(attention_of_a_block) { check_options(0, 2, 3, 7); }

TEST(attention_of_parts) { check_options(3, 2, 10, 13); }

TEST(attention_over_logits) {
  const AttentionShape s{3, 0, 5, 9, 1, 1, false, false};
  check_attention<float>(s, AttentionOutput::coordinates);
}

TEST(recurrence_with_attention) {
  for (const bool lstm : {false, true}) {
    for (const bool additive : {false, true}) {
      check_recurrence<float>(CellInput::projected, lstm, additive, false, 4, 12);
      check_recurrence<__half>(CellInput::sum, lstm, additive, additive, 5, 7);
      check_recurrence<double>(CellInput::between, lstm, additive, false, 3, 5);
    }
  }
  check_recurrence<float>(CellInput::sum, true, false, true, 2, 600);
  check_recurrence<float>(CellInput::projected, false, false, false, 3, 2100);  // columns beyond the threads'
}
