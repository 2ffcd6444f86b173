// How a call of spatial attention is cut into tasks, and what its forward and backward share.
//
// A sample is cut into blocks of positions by its shape alone. With enough samples for the threads a task is
// whole samples, pass after pass, so that what the first pass loads the last one finds in cache. Otherwise
// (`apart`) a pass is a parallel region over the blocks of all samples. Sums over positions are made per
// block and added in order, so that both ways give the same bits for any number of threads.
#pragma once

#include "spatial/cpu/params.h"
#include "spatial/cpu/pixels.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kBlockElements = 128 << 10;  // of the features in a block
constexpr int64_t kEnergyElements =
    32 << 10;  // of tanh(W f + U h) in a block: the second-level cache keeps them
constexpr int64_t kSerialElements = 32 << 10;  // below this, threads cost more than they save
constexpr int64_t kRecords = 32;               // partial sums of a weight's gradient, at most

struct Run {  // a block: positions [first, first + length) of sample n
  int64_t n, block, first, length;
};

struct Parts {
  int64_t area, length, blocks;  // blocks of `length` positions in a sample
  int64_t together;              // samples that add to one record
  bool apart, worth_it;

  Parts(const SpatialShape& s, int threads) : area(s.area()) {
    const int64_t by_features = kBlockElements / maximum(s.channels, 1);
    const int64_t by_rows = s.additive ? kEnergyElements / maximum(s.rows, 1) : by_features;
    const int64_t most = minimum(by_features, by_rows) / kRowMultiple * kRowMultiple;
    length = minimum(area, maximum(most, kRowMultiple));
    blocks = ceil_div(area, length);
    together = s.channels > 0 ? ceil_div(maximum(s.batch, 1), kRecords) : 1;
    worth_it = s.batch * maximum(s.channels, 1) * area * (s.additive ? s.rows : 1) > kSerialElements;
    const int64_t most_of_a_thread = ceil_div(s.batch, threads) * threads;
    apart = together == 1 && blocks > 1 && worth_it && 5 * most_of_a_thread > 6 * s.batch;
  }

  Run run(int64_t n, int64_t block) const {
    return {n, block, block * length, minimum(length, area - block * length)};
  }

  // pass(run, thread) on every block of all samples.
  template <class F>
  void each_block(int64_t batch, const Parallel& parallel, const F& pass) const {
    parallel(batch * blocks, true, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; ++i) pass(run(i / blocks, i % blocks), thread);
    });
  }
};

template <class S>
Planes<S> run_of(Planes<S>*, S* base, int64_t maps, int64_t channels, const Parts& parts, const Run& r) {
  S* const at = base ? base + r.n * maps * channels * parts.area + r.first : nullptr;
  return {at, parts.area, channels, r.length};
}

template <class S>
Pixels<S> run_of(Pixels<S>*, S* base, int64_t maps, int64_t channels, const Parts& parts, const Run& r) {
  S* const at = base ? base + (r.n * parts.area + r.first) * maps * channels : nullptr;
  return {at, maps * channels, channels, r.length};
}

// `from` in T: where it lies, or in the workspace.
template <class T, class S>
const T* widened(const void* from, int64_t count, Carver& shared) {
  if constexpr (sizeof(T) == sizeof(S)) {
    return static_cast<const T*>(from);
  } else {
    T* const to = shared.take<T>(from ? count : 0);
    if (from && shared.base) widen_row(static_cast<const S*>(from), count, to);
    return from ? to : nullptr;
  }
}

// A call's operands as both directions take them. Image is Planes or Pixels.
template <class T, class S, template <class> class Image>
struct SpatialPass {
  const SpatialForward& p;
  const SpatialShape& shape;
  Parts parts;
  int64_t pitch;  // of rows of positions
  T temperature;
  const T *weight, *v;
  T *x = nullptr, *y = nullptr;

  SpatialPass(const SpatialForward& call, int threads, Carver& shared)
      : p(call),
        shape(call.shape),
        parts(call.shape, threads),
        pitch(row_pitch(call.shape.area())),
        temperature(usable_temperature<T>(call.temperature)),
        weight(widened<T, S>(call.weight, call.shape.rows * call.shape.channels, shared)),
        v(widened<T, S>(call.v, call.shape.glimpses * call.shape.rows, shared)) {
    if (shape.output != SpatialOutput::coordinates) return;
    x = shared.take<T>(pitch);
    y = shared.take<T>(pitch);
    if (shared.base) coordinate_rows(shape.height, shape.width, x, y);
  }

  template <class E>
  Image<E> image(E* base, int64_t maps, const Run& r) const {
    return run_of(static_cast<Image<E>*>(nullptr), base, maps, shape.channels, parts, r);
  }
  Image<const S> features(const Run& r) const { return image(static_cast<const S*>(p.features), 1, r); }
  Rows<const T> weights() const { return {weight, shape.channels, shape.rows}; }
  Rows<const T> vs() const { return {v, shape.rows, shape.glimpses}; }
  const S* map_row(int64_t n, int64_t g) const {
    return static_cast<const S*>(p.map) + (n * shape.glimpses + g) * parts.area;
  }

  // A sample's mask as rows of bits, or null.
  const T* mask_bits(int64_t n, T* bits) const {
    if (!p.mask) return nullptr;
    expand_mask(p.mask + n * parts.area, parts.area, bits);
    return bits;
  }

  // tanh(W f + U h) of a block in e [A, pitch of the block].
  Planes<const T> energy(const Run& r, T* e) const {
    const int64_t row = row_pitch(parts.length);
    const S* term = static_cast<const S*>(p.hidden_term);
    for (int64_t a = 0; a < shape.rows; ++a)
      fill_row(r.length, term ? widen(term[r.n * shape.rows + a]) : T(0), e + a * row);
    project(features(r), weights(), Rows<T>{e, row, shape.rows});
    for (int64_t a = 0; a < shape.rows; ++a)
      for_vectors<T>(r.length, [&](int64_t i, int64_t) {
        T* const at = e + a * row + i;
        tanh(Vec<T>::load(at)).store(at);
      });
    return {e, row, shape.rows, r.length};
  }
  int64_t energy_size() const { return shape.additive ? shape.rows * row_pitch(parts.length) : 0; }

  // Scores of a block into rows [G] of the sample.
  void scores(const Run& r, T* rows, T* e) const {
    const Rows<T> s{rows + r.first, pitch, shape.glimpses};
    const void* term = shape.additive ? nullptr : p.hidden_term;
    for (int64_t g = 0; g < shape.glimpses; ++g)
      widen_row_or_zero(typed<S>(term, (r.n * shape.glimpses + g) * parts.area + r.first), r.length,
                        s.row(g));
    if (shape.additive)
      project(energy(r, e), vs(), s);
    else
      project(features(r), weights(), s);
  }
};

// Calls f<Image>() for the features' layout.
template <class F>
auto with_layout(const SpatialShape& s, const F& f) {
  return s.channels_last ? f.template operator()<Pixels>() : f.template operator()<Planes>();
}

}  // namespace fusednn::cpu::FUSEDNN_ISA
