// Spatial attention, backward from the map alone (scores are not kept):
//
//   d a = d map + sum_c d attended f      d z = a (d a - sum_p a d a)      d s = d z / T
//   d f = a d attended + W^T d s          dW = sum_{n, p} d s f            d T = -sum d z log(a) / T
//   additive: e = tanh(W f + U h) is made again; d v = sum d s e, and d s above is (v^T d s) (1 - e^2), whose
//   sum over p is the hidden term's gradient
//
// Tiling: parts.h. d weight and d v are summed per record (a few samples or, apart, a block), and
// records in order at the end. Bytes at least: features, gradient of the result and map read once, gradients
// written once. A sample's features and gradient are touched twice, the second time in cache if they fit.
#pragma once

#include "spatial/cpu/parts.h"

namespace fusednn::cpu::FUSEDNN_ISA {

template <class T, class S, template <class> class Image>
struct SpatialBackwardPass : SpatialPass<T, S, Image> {
  using Base = SpatialPass<T, S, Image>;
  using Base::p, Base::shape, Base::parts, Base::pitch;

  const SpatialBackward& b;
  struct Sample {  // d a, then d s [G, pitch]; a [G, pitch]; mask; gradient of the sums [G, C]
    T *d, *a, *keep, *grads;
  };
  int64_t rows_size, keep_size, grads_size, slot_size;
  int64_t weight_size, v_size, term_size, record_size, records;
  T *samples, *energies, *sums;
  double* temperatures;  // [N, G]

  SpatialBackwardPass(const SpatialBackward& call, int threads, Carver& shared)
      : Base(call.forward, threads, shared), b(call) {
    rows_size = shape.glimpses * pitch;
    keep_size = p.mask ? pitch : 0;
    grads_size = shape.output == SpatialOutput::sum ? row_pitch(shape.glimpses * shape.channels) : 0;
    slot_size = 2 * rows_size + keep_size + grads_size;
    weight_size = row_pitch(shape.rows * shape.channels);
    v_size = shape.additive ? row_pitch(shape.glimpses * shape.rows) : 0;
    term_size = shape.additive ? row_pitch(shape.rows) : 0;
    record_size = weight_size + v_size + term_size;
    records = parts.apart ? shape.batch * parts.blocks : ceil_div(shape.batch, parts.together);
    samples = shared.take<T>((parts.apart ? shape.batch : threads) * slot_size);
    energies = shared.take<T>(threads * 2 * this->energy_size());
    sums = shared.take<T>(records * record_size);
    temperatures = shared.take<double>(b.grad_temperature ? shape.batch * shape.glimpses : 0);
  }

  Sample sample(int64_t slot) const {
    T* const at = samples + slot * slot_size;
    T* const keep = at + 2 * rows_size;
    return {at, at + rows_size, keep_size ? keep : nullptr, keep + keep_size};
  }
  T* record(int64_t i) const { return sums + i * record_size; }

  // The mask, and the sums' gradient in T.
  void prepare(int64_t n, const Sample& s) const {
    this->mask_bits(n, s.keep);
    const int64_t count = shape.glimpses * shape.channels;
    if (grads_size) widen_row_or_zero(typed<S>(b.grad_attended, n * count), count, s.grads);
  }

  void map_gradient(const Run& r, const Sample& s) const {
    const Rows<T> d{s.d + r.first, pitch, shape.glimpses};
    for (int64_t g = 0; g < shape.glimpses; ++g)
      widen_row_or_zero(typed<S>(b.grad_map, (r.n * shape.glimpses + g) * parts.area + r.first), r.length,
                        d.row(g));
    if (!b.grad_attended) return;
    const S* grad = static_cast<const S*>(b.grad_attended);
    if (shape.output == SpatialOutput::scale)
      contract(this->features(r), this->image(grad, shape.glimpses, r), d);
    else if (shape.output == SpatialOutput::sum)
      project(this->features(r), Rows<const T>{s.grads, shape.channels, shape.glimpses}, d);
    else
      coordinates_gradient(r, grad + r.n * shape.glimpses * 2, d);
  }

  void coordinates_gradient(const Run& r, const S* xy, Rows<T> d) const {
    // A fused multiply-add rounds one of two products alone: which one, results have long depended on.
    const int first = shape.channels > 0 ? 0 : 1;
    const T* const along[] = {this->x + r.first, this->y + r.first};
    for (int64_t g = 0; g < shape.glimpses; ++g, xy += 2) {
      const Vec<T> by(static_cast<T>(widen(xy[first]))), by_other(static_cast<T>(widen(xy[1 - first])));
      for_vectors<T>(r.length, [&](int64_t i, int64_t) {
        const Vec<T> one = Vec<T>::load(along[first] + i) * by,
                     other = Vec<T>::load(along[1 - first] + i) * by_other;
        (Vec<T>::load(d.row(g) + i) + (one + other)).store(d.row(g) + i);
      });
    }
  }

  // d s of sample n; the positional hidden term's gradient is that.
  void score_gradient(int64_t n, const Sample& s) const {
    for (int64_t g = 0; g < shape.glimpses; ++g) {
      T *const d = s.d + g * pitch, *const a = s.a + g * pitch;
      const int64_t row = n * shape.glimpses + g;
      widen_row(this->map_row(n, g), parts.area, a);
      softmax_backward_row(parts.area, s.keep, a, this->temperature, d,
                           b.grad_temperature ? temperatures + row : nullptr);
      if (b.grad_term && !shape.additive)
        narrow_row(d, parts.area, static_cast<S*>(b.grad_term) + row * parts.area);
    }
  }

  // From d s of a block: its features' gradient, and its part of the sums.
  void features_gradient(const Run& r, const Sample& s, T* into, int thread) const {
    const T* keep = s.keep ? s.keep + r.first : nullptr;
    Rows<const T> d{s.d + r.first, pitch, shape.glimpses};
    if (shape.additive) d = products_gradient(r, d, keep, into, thread);
    if (b.grad_weight) reduce(this->features(r), d, keep, Rows<T>{into, shape.channels, shape.rows});
    if (!b.grad_features) return;
    const Rows<const T> a{s.a + r.first, pitch, shape.glimpses};
    const bool scaled = shape.output == SpatialOutput::scale;
    const S* grad = scaled ? static_cast<const S*>(b.grad_attended) : nullptr;
    const int64_t terms = grads_size && b.grad_attended ? shape.glimpses : 0;
    const Products<T> products[2] = {{this->weights(), d},
                                     {{s.grads, shape.channels, terms}, {a.data, pitch, terms}}};
    expand(products, this->image(grad, shape.glimpses, r), a, keep,
           this->image(static_cast<S*>(b.grad_features), 1, r));
  }

  // d (W f + U h) [A, block] of additive scores; adds to the sums of d v and of the hidden term.
  Rows<const T> products_gradient(const Run& r, Rows<const T> d, const T* keep, T* into, int thread) const {
    using V = Vec<T>;
    T* const own = energies + thread * 2 * this->energy_size();
    const Planes<const T> e = this->energy(r, own);
    const Planes<T> found{own + this->energy_size(), e.pitch, shape.rows, r.length};
    if (b.grad_v) reduce(e, d, keep, Rows<T>{into + weight_size, shape.rows, shape.glimpses});
    const Products<T> products[2] = {{this->vs(), d}, {{nullptr, 0, 0}, {nullptr, 0, 0}}};
    expand(products, Planes<const T>{}, d, keep, found);
    T* const terms = into + weight_size + v_size;
    for (int64_t a = 0; a < shape.rows; ++a) {
      V total(T(0));
      for_vectors<T>(r.length, [&](int64_t i, int64_t left) {
        const V energy = V::load(e.plane(a) + i, left);
        const V x = kept(V::load(found.plane(a) + i, left) * (V(T(1)) - energy * energy), keep, i);
        x.store(found.plane(a) + i);
        total = total + x;
      });
      terms[a] += sum(total);
    }
    return {found.data, found.pitch, shape.rows};
  }

  void store_terms(int64_t n, const T* terms) const {
    if (b.grad_term && shape.additive)
      narrow_row(terms, shape.rows, static_cast<S*>(b.grad_term) + n * shape.rows);
  }

  void whole_sample(int64_t n, T* into, int thread) const {
    const Sample s = sample(thread);
    T* const terms = into + weight_size + v_size;
    prepare(n, s);
    for (int64_t i = 0; i < parts.blocks; ++i) map_gradient(parts.run(n, i), s);
    score_gradient(n, s);
    fill_row(term_size, T(0), terms);
    for (int64_t i = 0; i < parts.blocks; ++i) features_gradient(parts.run(n, i), s, into, thread);
    store_terms(n, terms);
  }

  void apart(const Parallel& parallel) const {
    for (int64_t n = 0; n < shape.batch; ++n) prepare(n, sample(n));
    parts.each_block(shape.batch, parallel, [&](const Run& r, int) { map_gradient(r, sample(r.n)); });
    parallel(shape.batch, true, [&](int64_t begin, int64_t end, int) {
      for (int64_t n = begin; n < end; ++n) score_gradient(n, sample(n));
    });
    parts.each_block(shape.batch, parallel, [&](const Run& r, int thread) {
      T* const into = record(r.n * parts.blocks + r.block);
      fill_row(record_size, T(0), into);
      features_gradient(r, sample(r.n), into, thread);
    });
    for (int64_t n = 0; n < shape.batch; ++n) {
      T* const first = record(n * parts.blocks);
      for (int64_t i = 1; i < parts.blocks; ++i)
        for (int64_t j = 0; j < record_size; ++j) first[j] += first[i * record_size + j];
      store_terms(n, first + weight_size + v_size);
    }
  }

  // [from, from + count) of all samples' records, in order, to a gradient.
  void store_sum(int64_t from, int64_t count, void* grad) const {
    if (!grad) return;
    const int64_t step = parts.apart ? parts.blocks : 1;
    T* const total = record(0) + from;
    for (int64_t i = step; i < records; i += step)
      for (int64_t j = 0; j < count; ++j) total[j] += record(i)[from + j];
    narrow_row(total, count, static_cast<S*>(grad));
  }

  void run(const Parallel& parallel) const {
    if (parts.apart)
      apart(parallel);
    else
      parallel(records, parts.worth_it, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t i = begin; i < end; ++i) {
          fill_row(record_size, T(0), record(i));
          const int64_t first = i * parts.together, last = minimum(first + parts.together, shape.batch);
          for (int64_t n = first; n < last; ++n) whole_sample(n, record(i), thread);
        }
      });
    store_sum(0, shape.rows * shape.channels, b.grad_weight);
    store_sum(weight_size, shape.glimpses * shape.rows, b.grad_v);
    if (!b.grad_temperature) return;
    double total = 0;
    for (int64_t i = 0; i < shape.batch * shape.glimpses; ++i) total += temperatures[i];
    *b.grad_temperature = -total / this->temperature;
  }
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
