// Batch statistics without cancellation: each strip gives its mean and its squared deviations from that mean
// (two passes over data in the first-level cache); strips are merged in order, in double (Chan et al., 1983):
//
//   M2 = M2_a + M2_b + (mean_b - mean_a)^2 n_a n_b / (n_a + n_b)
//
// Strips are a matter of the shape alone, so that the result doesn't depend on the number of threads.
#pragma once

#include <math.h>

#include "conv/cpu/blocks.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kMergeChannels = 16;  // in a task

// Block [count][V w] plus `bias`, rounded to elements of S: statistics are those of the values that are stored.
template <int V, class S, class T>
void round_to_storage(T* block, int64_t count, const T* bias) {
  constexpr int w = Vec<T>::size;
  for (int v = 0; v < V; ++v, block += w) {
    const Vec<T> add = bias ? Vec<T>::load(bias + v * w) : Vec<T>(T(0));
    for (int64_t i = 0; i < count; ++i) {
      S stored[w];
      (Vec<T>::load(block + i * V * w) + add).store(stored);
      Vec<T>::load(stored).store(block + i * V * w);
    }
  }
}

// Of block [count][V w] plus `bias` into row `strip` of records [strips, 2, pitch], columns from `record` on.
template <int V, class T>
void strip_statistics(const T* block, int64_t count, T* record, int64_t strip, int64_t pitch, const T* bias) {
  constexpr int w = Vec<T>::size;
  constexpr int chains = 4;
  record += strip * 2 * pitch;
  for (int v = 0; v < V; ++v, block += w, record += w) {
    const auto total = [&](const auto& f) __attribute__((always_inline)) {
      Vec<T> sum[chains];
      for (int i = 0; i < chains; ++i) sum[i] = Vec<T>(T(0));
      int64_t i = 0;
      for (; i + chains <= count; i += chains)
#pragma GCC unroll 4
        for (int j = 0; j < chains; ++j) sum[j] = sum[j] + f(Vec<T>::load(block + (i + j) * V * w));
      for (; i < count; ++i) sum[0] = sum[0] + f(Vec<T>::load(block + i * V * w));
      return (sum[0] + sum[1]) + (sum[2] + sum[3]);
    };
    const Vec<T> shift = Vec<T>::load(block), each(T(1) / T(count));
    const Vec<T> mean =
        shift + each * total([&](Vec<T> x) __attribute__((always_inline)) { return x - shift; });
    const Vec<T> squares =
        total([&](Vec<T> x) __attribute__((always_inline)) { return (x - mean) * (x - mean); });
    (bias ? mean + Vec<T>::load(bias + v * w) : mean).store(record);
    squares.store(record + pitch);
  }
}

template <class T>
void merge_statistics(const Statistics& p, const Parallel& parallel) {
  const int64_t pitch = padded_channels(p.channels);
  const T* records = static_cast<const T*>(p.strip_statistics);
  T *mean = static_cast<T*>(p.mean), *rstd = static_cast<T*>(p.rstd), *norm = static_cast<T*>(p.norm);
  const T *weight = static_cast<const T*>(p.weight), *bias = static_cast<const T*>(p.bias);
  parallel(pitch / kMergeChannels, p.strips * p.channels > 16384, [&](int64_t begin, int64_t end, int) {
    for (int64_t first = begin * kMergeChannels; first < end * kMergeChannels; first += kMergeChannels) {
      double m[kMergeChannels] = {}, squares[kMergeChannels] = {};
      double before = 0;
      for (int64_t strip = 0; strip < p.strips && records; ++strip) {
        const T* record = records + strip * 2 * pitch + first;
        const double count = p.strip_counts[strip], all = before + count;
        for (int c = 0; c < kMergeChannels; ++c) {
          const double delta = record[c] - m[c];
          m[c] += delta * (count / all);
          squares[c] += record[pitch + c] + delta * delta * (before * count / all);
        }
        before = all;
      }
      for (int c = 0; c < kMergeChannels; ++c) {
        const int64_t channel = first + c;
        const bool real = channel < p.channels && records;
        const double r = real ? 1 / ::sqrt(squares[c] / p.count + p.eps) : 1;
        norm[channel] = real ? T(m[c]) : T(0);
        norm[pitch + channel] = real && weight ? T(r * weight[channel]) : T(r);
        norm[2 * pitch + channel] = real && bias ? T(bias[channel]) : T(0);
        if (!real) continue;
        mean[channel] = T(m[c]);
        rstd[channel] = T(r);
      }
    }
  });
}

template <class T>
void norm_coefficients(const NormCoefficients& p, const Parallel& parallel) {
  const int64_t pitch = padded_channels(p.channels);
  const T *sums = static_cast<const T*>(p.sums), *mean = static_cast<const T*>(p.mean),
          *rstd = static_cast<const T*>(p.rstd);
  const T* weight = static_cast<const T*>(p.weight);
  T *k = static_cast<T*>(p.coefficients), *grad_weight = static_cast<T*>(p.grad_weight),
    *grad_bias = static_cast<T*>(p.grad_bias);
  parallel(pitch / kMergeChannels, p.strips * p.channels > 16384, [&](int64_t begin, int64_t end, int) {
    for (int64_t first = begin * kMergeChannels; first < end * kMergeChannels; first += kMergeChannels) {
      double plain[kMergeChannels] = {}, centred[kMergeChannels] = {};
      for (int64_t strip = 0; strip < p.strips && mean; ++strip) {
        const T* record = sums + strip * 2 * pitch + first;
        for (int c = 0; c < kMergeChannels; ++c) {
          plain[c] += record[c];
          centred[c] += record[pitch + c];
        }
      }
      for (int c = 0; c < kMergeChannels; ++c) {
        const int64_t channel = first + c;
        const bool real = channel < p.channels && mean;
        const double r = real ? rstd[channel] : 1;
        const double scale = real && weight ? r * weight[channel] : r;
        k[channel] = T(real ? scale * plain[c] / p.count : 0);
        k[pitch + channel] = T(scale);
        k[2 * pitch + channel] = T(real ? scale * r * r * centred[c] / p.count : 0);
        k[3 * pitch + channel] = real ? mean[channel] : T(0);
        if (!real) continue;
        grad_weight[channel] = T(centred[c] * r);
        grad_bias[channel] = T(plain[c]);
      }
    }
  });
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
