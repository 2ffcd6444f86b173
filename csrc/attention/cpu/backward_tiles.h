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
struct BackwardTiles {
  struct Room {  // of a thread
    T *query, *grad, *scores, *ds, *capped, *kept;
  };

  const AttentionBackward& args;
  const Attention& c;
  const PackedPlaces<T> places;
  const KeyBias<T, S> key_bias;
  const int64_t all_columns;
  const RowBlocks blocks;
  const int64_t column_block, pitch, q_pitch, v_pitch, pack_parts;
  T *key_panels, *value_panels, *key_rows;  // packed
  bool* all_finite;                         // of each part of the keys
  T* deltas;                                // delta - grad_lse of each row
  T *offsets, *factors;                     // p = factor 2^(s - offset)

  BackwardTiles(const AttentionBackward& p, Carver& shared)
      : args(p),
        c(p.call),
        places{p.call},
        key_bias(p.call, shared),
        all_columns(longest_columns(p.call)),
        blocks(longest_rows(p.call), kBackwardRows),
        column_block(minimum(kBackwardColumns,
                             ceil_div(maximum(1, all_columns), kPanelColumns<T>) * kPanelColumns<T>)),
        pitch(column_block + Vec<T>::size),
        q_pitch(padded<T>(c.size)),
        v_pitch(padded<T>(c.value_size)),
        pack_parts(ceil_div(all_columns, kPackedColumns)) {
    const int64_t all_rows = c.batch * c.heads * c.rows;
    key_panels = shared.take<T>(places.all_panels() * c.size * kPanelColumns<T>);
    value_panels = shared.take<T>(places.all_panels() * c.value_size * kPanelColumns<T>);
    key_rows = shared.take<T>(places.all_rows() * q_pitch);
    all_finite = shared.take<bool>(c.sequences * c.groups * pack_parts);
    deltas = shared.take<T>(all_rows);
    offsets = shared.take<T>(all_rows);
    factors = shared.take<T>(all_rows);
  }

  Room room(Carver& own) const {
    const int64_t R = blocks.height;
    Room r;
    r.query = own.template take<T>(R * q_pitch);
    r.grad = own.template take<T>(R * v_pitch);
    r.scores = own.template take<T>(R * pitch);
    r.ds = own.template take<T>(R * pitch);
    r.capped = own.template take<T>(c.softcap > 0 ? R * pitch : 0);
    r.kept = own.template take<T>(c.dropout ? pitch : 0);
    return r;
  }

  // Operands, and then every row's delta: before any block.
  void prepare(const Parallel& parallel, bool worth_it, const auto& room_of) const {
    key_bias.fill(c);
    parallel(c.sequences * c.groups * pack_parts, worth_it, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        pack(i / (c.groups * pack_parts), i / pack_parts % c.groups, i % pack_parts);
    });
    const int64_t count = blocks.count;
    parallel(c.sequences * c.heads * count, worth_it, [&](int64_t begin, int64_t end, int thread) {
      const Room r = room_of(thread);
      for (int64_t i = begin; i < end; ++i)
        find_delta(Sequence(c, i / (c.heads * count)), i / count % c.heads, i % count * blocks.height, r);
    });
  }

  T weight_scale() const { return static_cast<T>(c.dropout ? c.dropout_scale : 1.); }

  void pack(int64_t n, int64_t group, int64_t part) const {
    const Sequence q(c, n);
    const int64_t begin = part * kPackedColumns;
    const int64_t end = minimum(q.columns + c.extra, begin + kPackedColumns);
    bool& finite = all_finite[(n * c.groups + group) * pack_parts + part];
    finite = true;
    if (begin >= end) return;
    const auto keys = source_of<S>(c, c.key, c.extra_key, c.size, q, group);
    const auto values = source_of<S>(c, c.value, c.extra_value, c.value_size, q, group);
    const int64_t panels = places.panels(q, group) * kPanelColumns<T>;
    for (int64_t i = begin / kPanelColumns<T>; i * kPanelColumns<T> < end; ++i) {
      pack_panel_of_columns(keys, i, key_panels + panels * c.size);
      pack_panel_of_columns(values, i, value_panels + panels * c.value_size);
    }
    finite = pack_rows(keys, begin, end, q_pitch, key_rows + places.rows(q, group) * q_pitch);
  }

  bool finite_keys(const Sequence& q, int64_t group) const {
    bool all = true;
    for (int64_t i = 0; i < pack_parts; ++i)
      all = all && all_finite[(q.index * c.groups + group) * pack_parts + i];
    return all;
  }

  int64_t row_index(const Sequence& q, int64_t head, int64_t row) const {
    return (q.batch * c.heads + head) * c.rows + q.first_row + row;
  }

  // Rows of q (scaled) and of the output's gradient.
  void load_rows(const Sequence& q, int64_t head, int64_t row, int64_t rows, const Room& r) const {
    const int64_t at = q.first_row + row;
    const Source<S> queries{
        head_row<S>(c.query, q.batch, head, at), c.query.row_stride, rows, nullptr, 0, c.size};
    pack_rows(queries, 0, rows, q_pitch, r.query, static_cast<T>(c.scale * kLog2e));
    if (args.grad_output.data) {
      const Source<S> grads{head_row<S>(args.grad_output, q.batch, head, at),
                            args.grad_output.row_stride,
                            rows,
                            nullptr,
                            0,
                            c.value_size};
      pack_rows(grads, 0, rows, v_pitch, r.grad);
    } else {
      std::memset(r.grad, 0, rows * v_pitch * sizeof(T));
    }
  }

  // What a row's scores are taken off, and what 2^ that is multiplied by, to be weights.
  void find_sums(const Sequence& q, int64_t head, int64_t row, int64_t rows, const Room& r) const {
    const T* lse = static_cast<const T*>(args.lse) + row_index(q, head, row);
    T *subtract = offsets + row_index(q, head, row), *factor = factors + row_index(q, head, row);
    bool large = false;
    for (int64_t i = 0; i < rows; ++i) {  // rows that keep nothing: 2^(-inf)
      subtract[i] = lse[i] == minus_infinity<T>() ? -minus_infinity<T>() : lse[i] * T(kLog2e);
      factor[i] = T(1);
      large = large || is_large(lse[i]);
    }
    if (!large) return;
    load_rows(q, head, row, rows, r);
    const int64_t columns = q.columns + c.extra;
    for (int64_t i = 0; i < rows; ++i)
      if (is_large(lse[i])) subtract[i] = minus_infinity<T>(), factor[i] = T(0);
    for (int64_t j = 0; j < columns; j += column_block) {
      const int64_t count = minimum(column_block, columns - j);
      make_scores(q, head, row, rows, j, count, r);
      for (int64_t i = 0; i < rows; ++i) {
        if (!is_large(lse[i])) continue;
        T* s = r.scores + i * pitch;
        const T block = largest_of(s, padded<T>(count)), largest = block > subtract[i] ? block : subtract[i];
        if (largest == minus_infinity<T>()) continue;
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
                   const Room& r) const {
    constexpr int64_t P = kPanelColumns<T>;
    const T* panels = key_panels + places.panels(q, head / (c.heads / c.groups)) * c.size * P;
    for (int64_t k = 0; k < count; k += P)
      multiply_panel<kWide>(rows, c.size, Strided<T>{r.query, q_pitch, 1}, panels + (j + k) * c.size, P,
                            r.scores + k, pitch, Into::overwrite);
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
                    bool complete, const Room& r) const {
    make_scores(q, head, row, rows, j, count, r);
    for (int64_t i = 0; i < rows; ++i) {
      T* s = r.scores + i * pitch;
      const int64_t at = row_index(q, head, row + i), whole = padded<T>(count);
      T factor = factors[at];
      const T largest = complete ? largest_of(s, whole) : minus_infinity<T>();
      if (largest != minus_infinity<T>())
        factor = T(1) / exp2_row(s, whole, largest);
      else
        exp2_row(s, whole, offsets[at]);
      if (factor == T(1)) continue;
      for (int64_t k = 0; k < count; k += Vec<T>::size) (Vec<T>::load(s + k) * Vec<T>(factor)).store(s + k);
    }
  }

  // ds before softcap's factor, from the weights; leaves p z, without dropout's scale, in their place.
  void make_ds(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t j, int64_t count,
               bool complete, const Room& r) const {
    using V = Vec<T>;
    constexpr int64_t P = kPanelColumns<T>;
    const T* panels = value_panels + places.panels(q, head / (c.heads / c.groups)) * c.value_size * P;
    for (int64_t k = 0; k < count; k += P)
      multiply_panel<kWide>(rows, c.value_size, Strided<T>{r.grad, v_pitch, 1},
                            panels + (j + k) * c.value_size, P, r.ds + k, pitch, Into::overwrite);
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
  // torch's softmax. g . o is rounded otherwise, which shows where a row's weight is nearly that of one
  // column.
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
                 const Room& r) const {
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
  void find_delta(const Sequence& q, int64_t head, int64_t row, const Room& r) const {
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
