// What attention's backward makes of a block of rows and columns of one head: weights p, made again from lse,
// and ds, the gradient of the scores.
//
//   p = 2^(s - lse)    ds = p (z (g . v + w) - delta + grad_lse)    delta = g . o + sum over j of p z w
//                                           w: the gradient of the weights, z: dropout
//
// lse has 24 bits. Where it is large (masks of finfo.min) 2^(s - lse) would be off by as many of them as it
// has before the point, so that such rows' largest score and sum are found again.
#pragma once

#include "attention/cpu/forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kBackwardRows = 96;
constexpr int64_t kBackwardColumns = 256;
constexpr double kLargeLse = 64;

template <class T, class S>
struct BackwardTiles : AttentionPass<T, S> {
  using Base = AttentionPass<T, S>;
  using Base::c, Base::places, Base::key_bias, Base::blocks, Base::column_block, Base::pitch, Base::q_pitch;
  using Base::v_pitch, Base::key_panels, Base::weight_scale;

  struct Buffers {  // of a thread
    T *query, *grad, *scores, *ds, *capped, *kept;
  };

  const AttentionBackward& args;
  T *value_panels, *key_rows;  // packed
  T* deltas;                   // delta - grad_lse of each row
  T *offsets, *factors;        // p = factor 2^(s - offset)

  BackwardTiles(const AttentionBackward& p, Carver& shared)
      : Base(p.call, kBackwardRows, kBackwardColumns, shared), args(p) {
    const int64_t all_rows = c.batch * c.heads * c.rows;
    value_panels = shared.take<T>(places.all_panels() * c.value_size * kPanelColumns<T>);
    key_rows = shared.take<T>(places.all_rows() * q_pitch);
    deltas = shared.take<T>(all_rows);
    offsets = shared.take<T>(all_rows);
    factors = shared.take<T>(all_rows);
  }

  Buffers buffers(Carver& own) const {
    const int64_t R = blocks.height;
    Buffers r;
    r.query = own.take<T>(R * q_pitch);
    r.grad = own.take<T>(R * v_pitch);
    r.scores = own.take<T>(R * pitch);
    r.ds = own.take<T>(R * pitch);
    r.capped = own.take<T>(c.softcap > 0 ? R * pitch : 0);
    r.kept = own.take<T>(c.dropout ? pitch : 0);
    return r;
  }

  // Operands, and then every row's delta: before any block.
  void prepare(const Parallel& parallel, bool worth_it, const auto& buffers_of) const {
    key_bias.fill(c);
    this->pack(parallel, worth_it, [&](const Sequence& q, int64_t group, int64_t begin, int64_t end) {
      const auto keys = source_of<S>(c, c.key, c.extra_key, c.size, q, group);
      const auto values = source_of<S>(c, c.value, c.extra_value, c.value_size, q, group);
      pack_panels_of_columns(keys, begin, end, this->panels_of(key_panels, q, group, c.size));
      pack_panels_of_columns(values, begin, end, this->panels_of(value_panels, q, group, c.value_size));
      return pack_rows(keys, begin, end, q_pitch, key_rows + places.rows(q, group) * q_pitch);
    });
    const int64_t count = blocks.count;
    parallel(c.sequences * c.heads * count, worth_it, [&](int64_t begin, int64_t end, int thread) {
      const Buffers r = buffers_of(thread);
      for (int64_t i = begin; i < end; ++i)
        find_delta(Sequence(c, i / (c.heads * count)), i / count % c.heads, i % count * blocks.height, r);
    });
  }

  int64_t row_index(const Sequence& q, int64_t head, int64_t row) const {
    return (q.batch * c.heads + head) * c.rows + q.first_row + row;
  }

  // Rows of q, scaled, and of the output's gradient.
  void load_rows(const Sequence& q, int64_t head, int64_t row, int64_t rows, const Buffers& r) const {
    this->load_query(q, head, row, rows, r.query);
    if (args.grad_output.data)
      pack_rows(rows_of<S>(args.grad_output, q, head, row, rows, c.value_size), 0, rows, v_pitch, r.grad);
    else
      std::memset(r.grad, 0, rows * v_pitch * sizeof(T));
  }

  // out[rows, count] = a[rows, size] panels[size, count] from column j of a head, up to whole panels.
  void multiply_panels(const Sequence& q, int64_t head, int64_t rows, int64_t size, const T* a,
                       int64_t a_pitch, T* panels, int64_t j, int64_t count, T* out) const {
    constexpr int64_t P = kPanelColumns<T>;
    const T* first = this->panels_of(panels, q, head / (c.heads / c.groups), size) + j * size;
    for (int64_t k = 0; k < count; k += P)
      multiply_panel<kWide>(rows, size, Strided<T>{a, a_pitch, 1}, first + k * size, P, out + k, pitch,
                            Into::overwrite);
  }

  // What a row's scores are taken off, and what 2^ that is multiplied by, to be weights.
  void find_sums(const Sequence& q, int64_t head, int64_t row, int64_t rows, const Buffers& r) const {
    const T* lse = static_cast<const T*>(args.lse) + row_index(q, head, row);
    T *subtract = offsets + row_index(q, head, row), *factor = factors + row_index(q, head, row);
    bool large = false;
    for (int64_t i = 0; i < rows; ++i) {  // rows that keep nothing: 2^(-inf)
      subtract[i] = lse[i] == -kInfinity<T> ? kInfinity<T> : lse[i] * T(kLog2e);
      factor[i] = T(1);
      large = large || is_large(lse[i]);
    }
    if (!large) return;
    load_rows(q, head, row, rows, r);
    const int64_t columns = q.columns + c.extra;
    for (int64_t i = 0; i < rows; ++i)
      if (is_large(lse[i])) subtract[i] = -kInfinity<T>, factor[i] = T(0);
    for (int64_t j = 0; j < columns; j += column_block) {
      const int64_t count = minimum(column_block, columns - j);
      make_scores(q, head, row, rows, j, count, r);
      for (int64_t i = 0; i < rows; ++i) {
        if (!is_large(lse[i])) continue;
        T* s = r.scores + i * pitch;
        const T block = largest_of(s, padded<T>(count)), largest = block > subtract[i] ? block : subtract[i];
        if (largest == -kInfinity<T>) continue;
        T down[Vec<T>::size];
        exp2(Vec<T>(subtract[i] - largest)).store(down);
        factor[i] = factor[i] * down[0] + exp2_row(s, padded<T>(count), largest);
        subtract[i] = largest;
      }
    }
    for (int64_t i = 0; i < rows; ++i)
      if (is_large(lse[i])) factor[i] = T(1) / factor[i];
  }

  static bool is_large(T lse) { return (lse > T(kLargeLse) || lse < -T(kLargeLse)) && lse - lse == T(0); }

  const S* weights_gradient(const Sequence& q, int64_t head, int64_t row) const {
    const int64_t columns = q.columns + c.extra;
    const int64_t at =
        args.returned == ReturnedWeights::mean ? q.batch * c.rows + row : row_index(q, head, row);
    return static_cast<const S*>(args.grad_weights) + at * columns;
  }
  T weights_share() const {
    return args.returned == ReturnedWeights::mean ? T(1) / static_cast<T>(c.heads) : T(1);
  }

  // Scores of rows [row, row + rows) and columns [j, j + count), up to whole vectors.
  void make_scores(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t j, int64_t count,
                   const Buffers& r) const {
    multiply_panels(q, head, rows, c.size, r.query, q_pitch, key_panels, j, count, r.scores);
    for (int64_t i = 0; i < rows; ++i) {
      T* s = r.scores + i * pitch;
      if (!plain_scores(c) || count % Vec<T>::size)
        finish_scores<T, S>(c, q, head, row + i, j, count, key_bias.of(q), s,
                            c.softcap > 0 ? r.capped + i * pitch : nullptr);
    }
  }

  // Weights p, before dropout, in their place. `complete`: all that the rows keep is here; then its own sum
  // is more exact than lse.
  void make_weights(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t j, int64_t count,
                    bool complete, const Buffers& r) const {
    make_scores(q, head, row, rows, j, count, r);
    for (int64_t i = 0; i < rows; ++i) {
      T* s = r.scores + i * pitch;
      const int64_t at = row_index(q, head, row + i), whole = padded<T>(count);
      T factor = factors[at];
      const T largest = complete ? largest_of(s, whole) : -kInfinity<T>;
      if (largest != -kInfinity<T>)
        factor = T(1) / exp2_row(s, whole, largest);
      else
        exp2_row(s, whole, offsets[at]);
      if (factor != T(1)) scale_row(s, whole, factor, s);
    }
  }

  // ds before softcap's factor, from the weights; leaves p z, without dropout's scale, in their place.
  void make_ds(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t j, int64_t count,
               bool complete, const Buffers& r) const {
    using V = Vec<T>;
    multiply_panels(q, head, rows, c.value_size, r.grad, v_pitch, value_panels, j, count, r.ds);
    const V zero(T(0)), scale(weight_scale());
    for (int64_t i = 0; i < rows; ++i) {
      T *p = r.scores + i * pitch, *ds = r.ds + i * pitch;
      if (args.grad_weights) {
        const S* w = weights_gradient(q, head, row + i) + j;
        const V share(weights_share());
        for (int64_t k = 0; k < count; k += V::size)
          (V::load(ds + k) + V::load(w + k, count - k) * share).store(ds + k);
      }
      if (c.dropout) {
        fill_kept(q, head, row + i, j, count, r);
        for (int64_t k = 0; k < count; k += V::size)
          V(V::load(r.kept + k).v == zero.v ? zero.v : (V::load(ds + k) * scale).v).store(ds + k);
      }
      const V delta(complete ? whole_delta(q, head, row + i, count, p, ds)
                             : deltas[row_index(q, head, row + i)]);
      for (int64_t k = 0; k < count; k += V::size) {
        const V x = V::load(p + k);  // where it is 0, g . v may be NaN
        V(x.v == zero.v ? zero.v : (x * (V::load(ds + k) - delta)).v).store(ds + k);
        if (c.dropout) (x * V::load(r.kept + k)).store(p + k);
      }
    }
  }

  // delta - grad_lse of a row whose columns are all here: sum of p dp, in which what is equal cancels, as in
  // torch's softmax. g . o is rounded otherwise, which shows where one column has nearly all of a row's weight.
  T whole_delta(const Sequence& q, int64_t head, int64_t row, int64_t count, const T* p, const T* dp) const {
    const Vec<T> zero(T(0));
    Vec<T> total(T(0));
    for (int64_t k = 0; k < count; k += Vec<T>::size) {
      const Vec<T> x = Vec<T>::load(p + k);
      total = total + Vec<T>(x.v == zero.v ? zero.v : (x * Vec<T>::load(dp + k)).v);
    }
    const T* grad_lse = static_cast<const T*>(args.grad_lse);
    return sum(total) - (grad_lse ? grad_lse[row_index(q, head, row)] : T(0));
  }

  void fill_kept(const Sequence& q, int64_t head, int64_t row, int64_t j, int64_t count,
                 const Buffers& r) const {
    for (int64_t k = 0; k < padded<T>(count); ++k) r.kept[k] = T(1);
    drop_weights(c, q.index, head, row, j, count, r.kept);
  }

  // g . o of at most 8 rows, summed as the tiles sum g . v: for a row that keeps a single column they are
  // equal, and the gradient of its score is 0.
  void add_outputs(const Sequence& q, int64_t head, int64_t row, int64_t rows, T* delta) const {
    const S *o[8], *g[8];
    T total[8], part[8];
    for (int64_t i = 0; i < 8; ++i) {
      total[i] = T(0);
      const int64_t at = q.first_row + row + minimum(i, rows - 1);
      o[i] = head_row<S>(args.output, q.batch, head, at);
      g[i] = args.grad_output.data ? head_row<S>(args.grad_output, q.batch, head, at) : nullptr;
    }
    for (int64_t v = 0; g[0] && v < c.value_size; v += kDepth) {
      for (int64_t i = 0; i < 8; ++i) part[i] = T(0);
      for (int64_t k = v; k < minimum(c.value_size, v + kDepth); ++k)
        for (int64_t i = 0; i < 8; ++i) part[i] += T(widen(g[i][k])) * T(widen(o[i][k]));
      for (int64_t i = 0; i < 8; ++i) total[i] += part[i];
    }
    for (int64_t i = 0; i < rows; ++i) delta[i] = total[i];
  }

  // delta - grad_lse of a block of rows.
  void find_delta(const Sequence& q, int64_t head, int64_t row, const Buffers& r) const {
    const int64_t rows = minimum(blocks.height, q.rows - row), columns = q.columns + c.extra;
    if (rows <= 0) return;
    find_sums(q, head, row, rows, r);
    T* delta = deltas + row_index(q, head, row);
    const T* grad_lse = static_cast<const T*>(args.grad_lse);
    constexpr int64_t together = 8;  // sums at a time, each a chain
    for (int64_t i = 0; i < rows; i += together)
      add_outputs(q, head, row + i, minimum(together, rows - i), delta + i);
    for (int64_t i = 0; grad_lse && i < rows; ++i) delta[i] -= grad_lse[row_index(q, head, row + i)];
    if (!args.grad_weights) return;
    load_rows(q, head, row, rows, r);
    for (int64_t j = 0; j < columns; j += column_block) {
      const int64_t count = minimum(column_block, columns - j);
      make_weights(q, head, row, rows, j, count, false, r);
      for (int64_t i = 0; i < rows; ++i) {
        T* p = r.scores + i * pitch;
        if (c.dropout) drop_weights(c, q.index, head, row + i, j, count, p);
        const S* w = weights_gradient(q, head, row + i) + j;
        Vec<T> total(T(0));
        for (int64_t k = 0; k < count; k += Vec<T>::size)
          total = total + Vec<T>::load(p + k) * Vec<T>::load(w + k, count - k);
        delta[i] += sum(total) * weights_share() * weight_scale();
      }
    }
  }
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
