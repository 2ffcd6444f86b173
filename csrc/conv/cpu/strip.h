// Runs of pixels: in from an image to [C / w][pixels][w] in a buffer, and what a norm or its gradient makes of
// them on the way.
#pragma once

#include "conv/cpu/activation.h"
#include "conv/cpu/depthwise.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kSerialFlops = 128 << 10;  // below this, threads cost more than they save

// The most work that a thread gets when `tasks` equal ones are dealt out, over an equal share.
inline double imbalance(int64_t tasks, int threads) {
  return static_cast<double>(ceil_div(tasks, threads) * threads) / tasks;
}

// Pixels from one channel block of a strip to the next: odd, so that blocks don't meet in one cache set.
constexpr int64_t strip_pitch(int64_t pixels) { return pixels | 1; }

// (z - mean) scale + shift on channels [c, c + w).
template <class T>
struct Norm {
  Vec<T> mean, scale, shift;
  Norm(const void* norm, int64_t channels, int64_t c) {
    const T* p = static_cast<const T*>(norm) + c;
    const int64_t pitch = padded_channels(channels);
    mean = Vec<T>::load(p);
    scale = Vec<T>::load(p + pitch);
    shift = Vec<T>::load(p + 2 * pitch);
  }
  FUSEDNN_INLINE Vec<T> operator()(Vec<T> z) const { return (z - mean) * scale + shift; }
};

// dz = k1 da - k0 - (z - mean) k2 on channels [c, c + w).
template <class T>
struct NormGradient {
  Vec<T> k0, k1, k2, mean;
  NormGradient(const void* coefficients, int64_t channels, int64_t c) {
    const T* p = static_cast<const T*>(coefficients) + c;
    const int64_t pitch = padded_channels(channels);
    k0 = Vec<T>::load(p);
    k1 = Vec<T>::load(p + pitch);
    k2 = Vec<T>::load(p + 2 * pitch);
    mean = Vec<T>::load(p + 3 * pitch);
  }
  FUSEDNN_INLINE Vec<T> operator()(Vec<T> da, Vec<T> z) const { return k1 * da - k0 - (z - mean) * k2; }
};

// Pixels [first, first + count) of image n, channels [c, c + w), to block [count][w].
template <class T, class S>
void load_block(const Pixels<S>& in, int64_t n, int64_t first, int64_t count, int64_t c, T* block) {
  load_columns(in.at(n, first, c), in.channels_last ? 1 : in.area, in.channels, in.channels - c, count, block,
               Vec<T>::size);
}

// Strips of at most `pixels` of each image.
struct Strips {
  int64_t batch, area, pixels, per_image;
  Strips(int64_t batch_, int64_t area_, int64_t most)
      : batch(batch_), area(area_), per_image(ceil_div(area_, minimum(area_, most))) {
    pixels = ceil_div(area, per_image);
    per_image = ceil_div(area, pixels);
  }
  int64_t total() const { return batch * per_image; }
  struct Strip {
    int64_t n, first, count;
  };
  Strip at(int64_t i) const {
    const int64_t first = i % per_image * pixels;
    return {i / per_image, first, minimum(pixels, area - first)};
  }
};

constexpr int64_t kTrainPixels = 128;

// Strips of whole rows of an image, a matter of the shape alone, as sums are kept by strip.
struct RowStrips {
  int64_t batch, height, width, rows, per_image;
  explicit RowStrips(const DepthwiseShape& s, int64_t most_pixels = kTrainPixels)
      : batch(s.batch), height(s.out_height), width(s.out_width) {
    rows = maximum(1, minimum(height, most_pixels / maximum(1, width)));
    rows = ceil_div(height, ceil_div(height, rows));
    per_image = ceil_div(height, rows);
  }
  int64_t total() const { return batch * per_image; }
  int64_t pixels() const { return rows * width; }
  struct Strip {
    int64_t n, row, rows, first, count;  // first, count: of pixels
  };
  Strip at(int64_t i) const {
    const int64_t row = i % per_image * rows, n_rows = minimum(rows, height - row);
    return {i / per_image, row, n_rows, row * width, n_rows * width};
  }
};

// The number of strips, and, if `counts` is not null, the pixels of each.
inline int64_t count_strips(const RowStrips& strips, int64_t* counts) {
  for (int64_t i = 0; counts && i < strips.total(); ++i) counts[i] = strips.at(i).count;
  return strips.total();
}
inline int64_t train_strips(const DepthwiseShape& s, int64_t* counts) {
  return count_strips(RowStrips(s), counts);
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
