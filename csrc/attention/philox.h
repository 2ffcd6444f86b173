// Dropout's random numbers: Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011).
//
// Every backend draws the same mask: of an attention score (batch, head, row, column) the counter is
// (column / 4, row, head, batch), the key the seed's two halves, and the word number column % 4. The score is
// dropped if its word is less than the threshold.
#pragma once

#include <math.h>

#include <cstdint>

#include "core/macros.h"

namespace fusednn::math {

struct Philox {
  uint32_t words[4];
};

constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

FUSEDNN_HOST_DEVICE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0,
                                      uint32_t k1) {
  const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
  c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
  c1 = static_cast<uint32_t>(b);
  c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
  c3 = static_cast<uint32_t>(a);
}

FUSEDNN_HOST_DEVICE Philox philox4x32(uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1)
    philox_round(c0, c1, c2, c3, k0, k1);
  return {{c0, c1, c2, c3}};
}

// min(round(p 2^32), 2^32 - 1), halves to even.
inline uint32_t dropout_threshold(double p) {
  const double threshold = ::rint(p * 4294967296.0);
  return threshold < 4294967295.0 ? static_cast<uint32_t>(threshold) : 0xffffffffu;
}

// What kept scores are multiplied by; 0 where nothing is to be kept.
inline double dropout_scale(double p) { return p < 1.0 ? 1.0 / (1.0 - p) : 0.0; }

}  // namespace fusednn::math
