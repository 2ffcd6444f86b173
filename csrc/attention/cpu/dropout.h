// Which weights of a row dropout keeps: attention/philox.h, 16 counters side by side.
#pragma once

#include "attention/cpu/params.h"
#include "attention/philox.h"
#include "core/cpu/vec.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int kCounters = 16;  // at a time: 64 columns

// Words of columns [first, first + 64), first a multiple of 64.
inline void philox_words(uint64_t seed, uint32_t batch, uint32_t head, uint32_t row, int64_t first,
                         uint32_t* words) {
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  for (int i = 0; i < kCounters; ++i) {
    c0[i] = static_cast<uint32_t>(first / 4 + i);
    c1[i] = row, c2[i] = head, c3[i] = batch;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += math::kPhiloxWeyl0, k1 += math::kPhiloxWeyl1)
    for (int i = 0; i < kCounters; ++i) math::philox_round(c0[i], c1[i], c2[i], c3[i], k0, k1);
  for (int i = 0; i < kCounters; ++i) {
    words[4 * i] = c0[i], words[4 * i + 1] = c1[i], words[4 * i + 2] = c2[i], words[4 * i + 3] = c3[i];
  }
}

// row[j] = 0 where the weight of column first + j is dropped; others stay (their scale is applied to sums).
template <class T>
void drop_weights(const Attention& c, int64_t batch, int64_t head, int64_t row_number, int64_t first,
                  int64_t count, T* row) {
  uint32_t words[4 * kCounters];
  for (int64_t at = first / 64 * 64; at < first + count; at += 64) {
    philox_words(c.dropout_seed, static_cast<uint32_t>(batch), static_cast<uint32_t>(head),
                 static_cast<uint32_t>(row_number), at, words);
    for (int i = 0; i < 64; ++i) {
      const int64_t j = at + i - first;
      if (j >= 0 && j < count && words[i] < c.dropout_threshold) row[j] = T(0);
    }
  }
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
