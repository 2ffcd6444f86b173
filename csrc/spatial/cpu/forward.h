// Spatial attention, forward: s = scores(f), a = softmax(s / T), attended = f a, sum f a or sum (x, y) a.
//
// Tiling: parts.h. The scores of a sample are rows of P numbers in the workspace; the softmax turns
// them into the map, which is written once. Bytes at least: features, hidden term, weight, result and map
// once. A sample's features are touched twice; the second time they come from cache, as long as a sample (or,
// apart, all that a thread has of it) fits there.
#pragma once

#include "spatial/cpu/parts.h"

namespace fusednn::cpu::FUSEDNN_ISA {

template <class T, class S, template <class> class Image>
struct SpatialForwardPass : SpatialPass<T, S, Image> {
  using Base = SpatialPass<T, S, Image>;
  using Base::p, Base::shape, Base::parts, Base::pitch;

  struct Sample {  // what is made of one: maps [G, pitch], mask, sums [G, C] or, apart, [blocks, G, C]
    T *rows, *keep, *sums;
  };
  int64_t rows_size, keep_size, sums_size;
  T *samples, *energies;

  SpatialForwardPass(const SpatialForward& call, int threads, Carver& shared) : Base(call, threads, shared) {
    rows_size = shape.glimpses * pitch;
    keep_size = call.mask ? pitch : 0;
    sums_size = shape.output == SpatialOutput::sum ? row_pitch(shape.glimpses * shape.channels) : 0;
    const int64_t slots = parts.apart ? shape.batch : threads;
    samples = shared.take<T>(slots * sample_size());
    energies = shared.take<T>(threads * this->energy_size());
  }

  int64_t sample_size() const { return rows_size + keep_size + sums_size * (parts.apart ? parts.blocks : 1); }
  Sample sample(int64_t slot) const {
    T* const at = samples + slot * sample_size();
    return {at, keep_size ? at + rows_size : nullptr, at + rows_size + keep_size};
  }
  void score(const Run& r, const Sample& s, int thread) const {
    this->scores(r, s.rows, energies + thread * this->energy_size());
  }

  // The map of sample n and, from it alone, its coordinates.
  void normalize(int64_t n, const Sample& s) const {
    const T* keep = this->mask_bits(n, s.keep);
    for (int64_t g = 0; g < shape.glimpses; ++g) {
      T* const row = s.rows + g * pitch;
      softmax_row(parts.area, keep, this->temperature, row);
      narrow_row(row, parts.area, const_cast<S*>(this->map_row(n, g)));
      if (shape.output != SpatialOutput::coordinates) continue;
      S* const xy = static_cast<S*>(p.attended) + (n * shape.glimpses + g) * 2;
      narrow(dot_rows(parts.area, row, this->x), xy);
      narrow(dot_rows(parts.area, row, this->y), xy + 1);
    }
  }

  void attend(const Run& r, const Sample& s, T* sums) const {
    const Rows<const T> a{s.rows + r.first, pitch, shape.glimpses};
    const T* keep = s.keep ? s.keep + r.first : nullptr;
    if (shape.output == SpatialOutput::scale)
      scale(this->features(r), a, keep, this->image(static_cast<S*>(p.attended), shape.glimpses, r));
    else if (shape.output == SpatialOutput::sum)
      reduce(this->features(r), a, keep, Rows<T>{sums, shape.channels, shape.glimpses});
  }

  // Adds the blocks' sums to the first's and stores them.
  void store_sums(int64_t n, T* sums, int64_t blocks) const {
    if (shape.output != SpatialOutput::sum) return;
    const int64_t count = shape.glimpses * shape.channels;
    for (int64_t b = 1; b < blocks; ++b)
      for (int64_t i = 0; i < count; ++i) sums[i] += sums[b * sums_size + i];
    narrow_row(sums, count, static_cast<S*>(p.attended) + n * count);
  }

  void whole_sample(int64_t n, int thread) const {
    const Sample s = sample(thread);
    for (int64_t b = 0; b < parts.blocks; ++b) score(parts.run(n, b), s, thread);
    normalize(n, s);
    fill_row(sums_size, T(0), s.sums);
    for (int64_t b = 0; b < parts.blocks; ++b) attend(parts.run(n, b), s, s.sums);
    store_sums(n, s.sums, 1);
  }

  void run(const Parallel& parallel) const {
    if (!parts.apart) {
      parallel(shape.batch, parts.worth_it, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t n = begin; n < end; ++n) whole_sample(n, thread);
      });
      return;
    }
    parts.each_block(shape.batch, parallel, [&](const Run& r, int thread) { score(r, sample(r.n), thread); });
    parallel(shape.batch, true, [&](int64_t begin, int64_t end, int) {
      for (int64_t n = begin; n < end; ++n) normalize(n, sample(n));
    });
    if (shape.output == SpatialOutput::coordinates) return;
    parts.each_block(shape.batch, parallel, [&](const Run& r, int) {
      const Sample s = sample(r.n);
      T* const sums = s.sums + r.block * sums_size;
      fill_row(sums_size, T(0), sums);
      attend(r, s, sums);
    });
    for (int64_t n = 0; n < shape.batch; ++n) store_sums(n, sample(n).sums, parts.blocks);
  }
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
