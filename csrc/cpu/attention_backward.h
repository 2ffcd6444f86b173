// Attention on the CPU, backward: weights are made again from lse, tile by tile.
//
//   p = 2^(s - lse)    dp = z (g . v + w)    ds = p (dp - delta + grad_lse)    delta = g . o + sum over j of
//   p z w dv_j += p z g      dk_j += scale ds q    dq_i += scale ds k                 w: the gradient of the
//   weights
//
// A task is a part of the columns of one key head of one sequence (all of them, where there are heads enough
// for any number of threads): its dk and dv stay with it while all rows of all its query heads go past.
// Parts, and so all sums, depend on the shape alone: the same bits for any number of threads. For a block of
// rows and columns: five products, of which s and dp come from panels (attention_pack.h), the others from
// rows.
//
// lse has 24 bits. Where it is large (masks of finfo.min) 2^(s - lse) would be off by as many of them as it
// has before the point, so that such rows' largest score and sum are found again.
//
// Gradients of masks, which sum over samples, heads or rows, are a pass of their own over the masks' blocks.
// Bytes: q, g once for each part, keys and values in cache. Flops: 2 L S (3 D + 2 V) a head.
#pragma once

#include "cpu/attention_forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kBackwardRows = 96;
constexpr int64_t kBackwardColumns = 256;
constexpr double kLargeLse = 64;
constexpr int64_t kBackwardTasks = 8;  // with fewer heads, columns are cut into parts

template <class T, class S>
class AttentionBackwardKernel {
 public:
  AttentionBackwardKernel(const AttentionBackward& p, int threads, Carver& shared)
      : p_(p),
        c_(p.call),
        places_{p.call},
        key_bias_(p.call, shared),
        all_columns_(longest_columns(p.call)),
        blocks_(longest_rows(p.call), kBackwardRows),
        column_block_(minimum(kBackwardColumns,
                              ceil_div(maximum(1, all_columns_), kPanelColumns<T>) * kPanelColumns<T>)),
        pitch_(column_block_ + Vec<T>::size),
        q_pitch_(padded<T>(c_.size)),
        v_pitch_(padded<T>(c_.value_size)) {
    pack_parts_ = ceil_div(all_columns_, kPackedColumns);
    const int64_t blocks = maximum(1, ceil_div(all_columns_, column_block_));
    const int64_t heads = maximum(1, c_.sequences * c_.groups);
    parts_ = heads >= kBackwardTasks ? 1 : minimum(blocks, ceil_div(kBackwardTasks, heads));
    part_columns_ = ceil_div(blocks, parts_) * column_block_;
    parts_ = maximum(1, ceil_div(all_columns_, part_columns_));
    key_panels_ = shared.take<T>(places_.all_panels() * c_.size * kPanelColumns<T>);
    value_panels_ = shared.take<T>(places_.all_panels() * c_.value_size * kPanelColumns<T>);
    keys_ = shared.take<T>(places_.all_rows() * q_pitch_);
    finite_ = shared.take<bool>(c_.sequences * c_.groups * pack_parts_);
    delta_ = shared.take<T>(c_.batch * c_.heads * c_.rows);
    const int64_t all_rows = c_.batch * c_.heads * c_.rows;
    subtract_ = shared.take<T>(all_rows);
    factor_ = shared.take<T>(all_rows);
    partial_ = parts_ > 1 ? shared.take<T>(parts_ * all_rows * q_pitch_) : nullptr;
    extra_keys_ = shared.take<T>(c_.batch * c_.groups * c_.extra * c_.size);
    extra_values_ = shared.take<T>(c_.batch * c_.groups * c_.extra * c_.value_size);
    thread_bytes_ = shared.bytes;
    for (int t = 0; t < threads; ++t) room(shared);
    thread_bytes_ = threads ? (shared.bytes - thread_bytes_) / threads : 0;
    base_ = shared.base ? shared.base + shared.bytes - threads * thread_bytes_ : nullptr;
  }

  void run(const Parallel& parallel) const {
    key_bias_.fill(c_);
    const int64_t products = c_.sequences * c_.heads * longest_rows(c_) * all_columns_ * c_.size;
    const bool worth_it = products > kSerialProducts / 2;
    const int64_t groups = c_.groups, blocks = blocks_.count;
    parallel(c_.sequences * groups * pack_parts_, worth_it, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        pack(i / (groups * pack_parts_), i / pack_parts_ % groups, i % pack_parts_);
    });
    parallel(c_.sequences * c_.heads * blocks, worth_it, [&](int64_t begin, int64_t end, int thread) {
      const Room r = room_of(thread);
      for (int64_t i = begin; i < end; ++i)
        find_delta(Sequence(c_, i / (c_.heads * blocks)), i / blocks % c_.heads, i % blocks * blocks_.height,
                   r);
    });
    if (p_.grad_query.data || p_.grad_key.data || p_.grad_value.data || p_.grad_extra_key ||
        p_.grad_extra_value) {
      parallel(c_.sequences * groups * parts_, worth_it, [&](int64_t begin, int64_t end, int thread) {
        const Room r = room_of(thread);
        for (int64_t i = begin; i < end; ++i)
          head_gradients(Sequence(c_, i / (groups * parts_)), i / parts_ % groups, i % parts_, r);
      });
      if (parts_ > 1 && p_.grad_query.data) add_partials(parallel, worth_it);
      add_extra(extra_keys_, c_.size, static_cast<S*>(p_.grad_extra_key), static_cast<T>(kLn2));
      add_extra(extra_values_, c_.value_size, static_cast<S*>(p_.grad_extra_value), weight_scale());
    }
    if (p_.grad_mask) mask_gradient(parallel, worth_it, p_.mask_sizes, static_cast<S*>(p_.grad_mask));
    const int64_t key_mask_sizes[4] = {c_.batch, 1, 1, c_.columns};
    if (p_.grad_key_mask)
      mask_gradient(parallel, worth_it, key_mask_sizes, static_cast<S*>(p_.grad_key_mask));
  }

 private:
  struct Room {  // of a thread
    T *query, *grad, *scores, *ds, *capped, *kept, *grad_query, *grad_keys, *grad_values;
  };

  Room room(Carver& own) const {
    const int64_t R = blocks_.height;
    Room r;
    r.query = own.template take<T>(R * q_pitch_);
    r.grad = own.template take<T>(R * v_pitch_);
    r.scores = own.template take<T>(R * pitch_);
    r.ds = own.template take<T>(R * pitch_);
    r.capped = own.template take<T>(c_.softcap > 0 ? R * pitch_ : 0);
    r.kept = own.template take<T>(c_.dropout ? pitch_ : 0);
    r.grad_query = own.template take<T>(maximum(R * q_pitch_, R * pitch_));
    r.grad_keys = own.template take<T>(minimum(part_columns_, all_columns_) * q_pitch_);
    r.grad_values = own.template take<T>(minimum(part_columns_, all_columns_) * v_pitch_);
    return r;
  }
  Room room_of(int thread) const {
    Carver own(base_ + thread * thread_bytes_);
    return room(own);
  }

  T weight_scale() const { return static_cast<T>(c_.dropout ? c_.dropout_scale : 1.); }

  void pack(int64_t n, int64_t group, int64_t part) const {
    const Sequence q(c_, n);
    const int64_t begin = part * kPackedColumns;
    const int64_t end = minimum(q.columns + c_.extra, begin + kPackedColumns);
    bool& finite = finite_[(n * c_.groups + group) * pack_parts_ + part];
    finite = true;
    if (begin >= end) return;
    const auto keys = source_of<S>(c_, c_.key, c_.extra_key, c_.size, q, group);
    const auto values = source_of<S>(c_, c_.value, c_.extra_value, c_.value_size, q, group);
    const int64_t panels = places_.panels(q, group) * kPanelColumns<T>;
    for (int64_t i = begin / kPanelColumns<T>; i * kPanelColumns<T> < end; ++i) {
      pack_panel_of_columns(keys, i, key_panels_ + panels * c_.size);
      pack_panel_of_columns(values, i, value_panels_ + panels * c_.value_size);
    }
    finite = pack_rows(keys, begin, end, q_pitch_, keys_ + places_.rows(q, group) * q_pitch_);
  }

  bool finite_keys(const Sequence& q, int64_t group) const {
    bool all = true;
    for (int64_t i = 0; i < pack_parts_; ++i)
      all = all && finite_[(q.index * c_.groups + group) * pack_parts_ + i];
    return all;
  }

  int64_t row_index(const Sequence& q, int64_t head, int64_t row) const {
    return (q.batch * c_.heads + head) * c_.rows + q.first_row + row;
  }

  // Rows of q (scaled) and of the output's gradient.
  void load_rows(const Sequence& q, int64_t head, int64_t row, int64_t rows, const Room& r) const {
    const int64_t at = q.first_row + row;
    const Source<S> queries{
        head_row<S>(c_.query, q.batch, head, at), c_.query.row_stride, rows, nullptr, 0, c_.size};
    pack_rows(queries, 0, rows, q_pitch_, r.query, static_cast<T>(c_.scale * kLog2e));
    if (p_.grad_output.data) {
      const Source<S> grads{head_row<S>(p_.grad_output, q.batch, head, at),
                            p_.grad_output.row_stride,
                            rows,
                            nullptr,
                            0,
                            c_.value_size};
      pack_rows(grads, 0, rows, v_pitch_, r.grad);
    } else {
      std::memset(r.grad, 0, rows * v_pitch_ * sizeof(T));
    }
  }

  // What a row's scores are taken off, and what 2^ that is multiplied by, to be weights.
  void find_sums(const Sequence& q, int64_t head, int64_t row, int64_t rows, const Room& r) const {
    const T* lse = static_cast<const T*>(p_.lse) + row_index(q, head, row);
    T *subtract = subtract_ + row_index(q, head, row), *factor = factor_ + row_index(q, head, row);
    bool large = false;
    for (int64_t i = 0; i < rows; ++i) {  // rows that keep nothing: 2^(-inf)
      subtract[i] = lse[i] == minus_infinity<T>() ? -minus_infinity<T>() : lse[i] * T(kLog2e);
      factor[i] = T(1);
      large = large || is_large(lse[i]);
    }
    if (!large) return;
    load_rows(q, head, row, rows, r);
    const int64_t columns = q.columns + c_.extra;
    for (int64_t i = 0; i < rows; ++i)
      if (is_large(lse[i])) subtract[i] = minus_infinity<T>(), factor[i] = T(0);
    for (int64_t j = 0; j < columns; j += column_block_) {
      const int64_t count = minimum(column_block_, columns - j);
      make_scores(q, head, row, rows, j, count, r);
      for (int64_t i = 0; i < rows; ++i) {
        if (!is_large(lse[i])) continue;
        T* s = r.scores + i * pitch_;
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
    const int64_t columns = q.columns + c_.extra;
    const int64_t at =
        p_.returned == ReturnedWeights::mean ? q.batch * c_.rows + row : row_index(q, head, row);
    return static_cast<const S*>(p_.grad_weights) + at * columns;
  }
  T weights_share() const {
    return p_.returned == ReturnedWeights::mean ? T(1) / static_cast<T>(c_.heads) : T(1);
  }

  // Scores of rows [row, row + rows) and columns [j, j + count), up to whole vectors.
  void make_scores(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t j, int64_t count,
                   const Room& r) const {
    constexpr int64_t P = kPanelColumns<T>;
    const T* panels = key_panels_ + places_.panels(q, head / (c_.heads / c_.groups)) * c_.size * P;
    for (int64_t k = 0; k < count; k += P)
      multiply_panel<kWide>(rows, c_.size, Strided<T>{r.query, q_pitch_, 1}, panels + (j + k) * c_.size, P,
                            r.scores + k, pitch_, Into::overwrite);
    for (int64_t i = 0; i < rows; ++i) {
      T* s = r.scores + i * pitch_;
      if (!plain_scores(c_) || count % Vec<T>::size)
        finish_scores<T, S>(c_, q, head, row + i, j, count, key_bias_.of(q), s,
                            c_.softcap > 0 ? r.capped + i * pitch_ : nullptr);
    }
  }

  // Weights p, before dropout, in their place. `complete`: all that the rows keep is here; then its own sum
  // is more exact than lse.
  void make_weights(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t j, int64_t count,
                    bool complete, const Room& r) const {
    make_scores(q, head, row, rows, j, count, r);
    for (int64_t i = 0; i < rows; ++i) {
      T* s = r.scores + i * pitch_;
      const int64_t at = row_index(q, head, row + i), whole = padded<T>(count);
      T factor = factor_[at];
      const T largest = complete ? largest_of(s, whole) : minus_infinity<T>();
      if (largest != minus_infinity<T>())
        factor = T(1) / exp2_row(s, whole, largest);
      else
        exp2_row(s, whole, subtract_[at]);
      if (factor == T(1)) continue;
      for (int64_t k = 0; k < count; k += Vec<T>::size) (Vec<T>::load(s + k) * Vec<T>(factor)).store(s + k);
    }
  }

  // ds before softcap's factor, from the weights; leaves p z, without dropout's scale, in their place.
  void make_ds(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t j, int64_t count,
               bool complete, const Room& r) const {
    using V = Vec<T>;
    constexpr int64_t P = kPanelColumns<T>;
    const T* panels = value_panels_ + places_.panels(q, head / (c_.heads / c_.groups)) * c_.value_size * P;
    for (int64_t k = 0; k < count; k += P)
      multiply_panel<kWide>(rows, c_.value_size, Strided<T>{r.grad, v_pitch_, 1},
                            panels + (j + k) * c_.value_size, P, r.ds + k, pitch_, Into::overwrite);
    const V zero(T(0)), scale(weight_scale());
    for (int64_t i = 0; i < rows; ++i) {
      T *p = r.scores + i * pitch_, *ds = r.ds + i * pitch_;
      if (p_.grad_weights) {
        const S* w = weights_gradient(q, head, row + i) + j;
        const V share(weights_share());
        for (int64_t k = 0; k < count; k += V::size)
          (V::load(ds + k) + V::load(w + k, count - k) * share).store(ds + k);
      }
      if (c_.dropout) {
        fill_kept(q, head, row + i, j, count, r);
        for (int64_t k = 0; k < count; k += V::size)
          V(V::load(r.kept + k).v == zero.v ? zero.v : (V::load(ds + k) * scale).v).store(ds + k);
      }
      const V delta(complete ? whole_delta(q, head, row + i, count, p, ds)
                             : delta_[row_index(q, head, row + i)]);
      for (int64_t k = 0; k < count; k += V::size) {
        const V x = V::load(p + k);  // where it is 0, g . v may be NaN
        V(x.v == zero.v ? zero.v : (x * (V::load(ds + k) - delta)).v).store(ds + k);
        if (c_.dropout) (x * V::load(r.kept + k)).store(p + k);
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
    const T* grad_lse = static_cast<const T*>(p_.grad_lse);
    return sum(total) - (grad_lse ? grad_lse[row_index(q, head, row)] : T(0));
  }

  void fill_kept(const Sequence& q, int64_t head, int64_t row, int64_t j, int64_t count,
                 const Room& r) const {
    for (int64_t k = 0; k < padded<T>(count); ++k) r.kept[k] = T(1);
    drop_weights(c_, q.index, head, row, j, count, r.kept);
  }

  // g . o of at most 8 rows, summed as the tiles sum g . v: for a row that keeps a single column they are
  // equal, and the gradient of its score is 0.
  void add_outputs(const Sequence& q, int64_t head, int64_t row, int64_t rows, T* delta) const {
    const S *o[8], *g[8];
    T total[8], part[8];
    for (int64_t i = 0; i < 8; ++i) {
      total[i] = T(0);
      const int64_t at = q.first_row + row + minimum(i, rows - 1);
      o[i] = head_row<S>(p_.output, q.batch, head, at);
      g[i] = p_.grad_output.data ? head_row<S>(p_.grad_output, q.batch, head, at) : nullptr;
    }
    for (int64_t v = 0; g[0] && v < c_.value_size; v += kDepth) {
      for (int64_t i = 0; i < 8; ++i) part[i] = T(0);
      for (int64_t k = v; k < minimum(c_.value_size, v + kDepth); ++k)
        for (int64_t i = 0; i < 8; ++i) part[i] += T(widen(g[i][k])) * T(widen(o[i][k]));
      for (int64_t i = 0; i < 8; ++i) total[i] += part[i];
    }
    for (int64_t i = 0; i < rows; ++i) delta[i] = total[i];
  }

  // delta - grad_lse of a block of rows.
  void find_delta(const Sequence& q, int64_t head, int64_t row, const Room& r) const {
    const int64_t rows = minimum(blocks_.height, q.rows - row), columns = q.columns + c_.extra;
    if (rows <= 0) return;
    find_sums(q, head, row, rows, r);
    T* delta = delta_ + row_index(q, head, row);
    const T* grad_lse = static_cast<const T*>(p_.grad_lse);
    constexpr int64_t together = 8;  // sums at a time, each a chain
    for (int64_t i = 0; i < rows; i += together)
      add_outputs(q, head, row + i, minimum(together, rows - i), delta + i);
    for (int64_t i = 0; grad_lse && i < rows; ++i) delta[i] -= grad_lse[row_index(q, head, row + i)];
    if (!p_.grad_weights) return;
    load_rows(q, head, row, rows, r);
    for (int64_t j = 0; j < columns; j += column_block_) {
      const int64_t count = minimum(column_block_, columns - j);
      make_weights(q, head, row, rows, j, count, false, r);
      for (int64_t i = 0; i < rows; ++i) {
        T* p = r.scores + i * pitch_;
        if (c_.dropout) drop_weights(c_, q.index, head, row + i, j, count, p);
        const S* w = weights_gradient(q, head, row + i) + j;
        Vec<T> total(T(0));
        for (int64_t k = 0; k < count; k += Vec<T>::size)
          total = total + Vec<T>::load(p + k) * Vec<T>::load(w + k, count - k);
        delta[i] += sum(total) * weights_share() * weight_scale();
      }
    }
  }

  // dq, dk and dv of the columns of one part of a key head.
  void head_gradients(const Sequence& q, int64_t group, int64_t part, const Room& r) const {
    const int64_t columns = q.columns + c_.extra, begin = part * part_columns_;
    const int64_t end = minimum(columns, begin + part_columns_), share = c_.heads / c_.groups;
    if (begin < end) {
      std::memset(r.grad_keys, 0, (end - begin) * q_pitch_ * sizeof(T));
      std::memset(r.grad_values, 0, (end - begin) * v_pitch_ * sizeof(T));
    }
    const bool finite = finite_keys(q, group);
    for (int64_t head = group * share; head < (group + 1) * share; ++head)
      for (int64_t row = 0; row < q.rows; row += blocks_.height) {
        const int64_t rows = minimum(blocks_.height, q.rows - row);
        load_rows(q, head, row, rows, r);
        std::memset(r.grad_query, 0, rows * q_pitch_ * sizeof(T));
        const Columns seen = seen_columns(c_, row, row + rows, key_bias_.within(q));
        constexpr int64_t P = kPanelColumns<T>;
        const int64_t last = c_.extra ? end : minimum(end, seen.end);
        for (int64_t j = c_.extra ? begin : maximum(begin, seen.begin / P * P); j < last;
             j += column_block_) {
          const int64_t count = minimum(column_block_, last - j);
          if ((j + count <= seen.begin || j >= seen.end) && j + count <= q.columns) continue;
          const bool complete = c_.extra ? count == columns : j <= seen.begin && j + count >= seen.end;
          block(q, head, row, rows, j, count, begin, finite, complete, r);
        }
        write_query(q, head, row, rows, part, r);
      }
    write_columns(q, group, begin, end, r);
  }

  void block(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t j, int64_t count,
             int64_t begin, bool finite, bool complete, const Room& r) const {
    constexpr int w = Vec<T>::size;
    make_weights(q, head, row, rows, j, count, complete, r);
    make_ds(q, head, row, rows, j, count, complete, r);
    const Strided<T> weights_t{r.scores, 1, pitch_}, ds_t{r.ds, 1, pitch_}, ds{r.ds, pitch_, 1};
    if (p_.grad_value.data || p_.grad_extra_value)
      multiply(count, v_pitch_ / w, rows, weights_t, r.grad, v_pitch_, r.grad_values + (j - begin) * v_pitch_,
               v_pitch_, Into::add);
    if (c_.softcap > 0) through_softcap(rows, count, r);
    if (p_.grad_key.data || p_.grad_extra_key)
      multiply(count, q_pitch_ / w, rows, ds_t, r.query, q_pitch_, r.grad_keys + (j - begin) * q_pitch_,
               q_pitch_, Into::add);
    if (!p_.grad_query.data) return;
    const T* keys = keys_ + (places_.rows(q, head / (c_.heads / c_.groups)) + j) * q_pitch_;
    if (finite)
      multiply(rows, q_pitch_ / w, count, ds, keys, q_pitch_, r.grad_query, q_pitch_, Into::add);
    else
      multiply_kept(rows, q_pitch_ / w, count, ds, keys, q_pitch_, r.grad_query, q_pitch_);
  }

  void through_softcap(int64_t rows, int64_t count, const Room& r) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < count; k += Vec<T>::size) {
        T* ds = r.ds + i * pitch_ + k;
        const Vec<T> t = Vec<T>::load(r.capped + i * pitch_ + k), x = Vec<T>::load(ds), zero(T(0));
        Vec<T>(x.v == zero.v ? zero.v : (x * (Vec<T>(T(1)) - t * t)).v).store(ds);
      }
  }

  static void write_row(const T* row, int64_t size, T by, S* out) {
    for (int64_t d = 0; d < size; d += Vec<T>::size)
      (Vec<T>::load(row + d) * Vec<T>(by)).store(out + d, size - d);
  }

  void write_query(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t part,
                   const Room& r) const {
    if (!p_.grad_query.data) return;
    if (parts_ > 1) {
      const int64_t all = c_.batch * c_.heads * c_.rows;
      T* to = partial_ + (part * all + row_index(q, head, row)) * q_pitch_;
      std::memcpy(to, r.grad_query, rows * q_pitch_ * sizeof(T));
      return;
    }
    for (int64_t i = 0; i < rows; ++i)
      write_row(r.grad_query + i * q_pitch_, c_.size, static_cast<T>(c_.scale),
                head_row<S>(p_.grad_query, q.batch, head, q.first_row + row + i));
  }

  // Partial dq of the parts, added up in order.
  void add_partials(const Parallel& parallel, bool worth_it) const {
    const int64_t all = c_.batch * c_.heads * c_.rows;
    parallel(all, worth_it, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        T* first = partial_ + i * q_pitch_;
        for (int64_t part = 1; part < parts_; ++part)
          for (int64_t d = 0; d < q_pitch_; d += Vec<T>::size)
            (Vec<T>::load(first + d) + Vec<T>::load(first + part * all * q_pitch_ + d)).store(first + d);
        write_row(first, c_.size, static_cast<T>(c_.scale),
                  head_row<S>(p_.grad_query, i / (c_.heads * c_.rows), i / c_.rows % c_.heads, i % c_.rows));
      }
    });
  }

  // dk was made from q times scale log2(e), dv from weights without dropout's scale.
  void write_columns(const Sequence& q, int64_t group, int64_t begin, int64_t end, const Room& r) const {
    for (int64_t j = begin; j < end; ++j) {
      const T *k = r.grad_keys + (j - begin) * q_pitch_, *v = r.grad_values + (j - begin) * v_pitch_;
      if (j >= q.columns) {
        const int64_t x = (q.batch * c_.groups + group) * c_.extra + j - q.columns;
        std::memcpy(extra_keys_ + x * c_.size, k, c_.size * sizeof(T));
        std::memcpy(extra_values_ + x * c_.value_size, v, c_.value_size * sizeof(T));
        continue;
      }
      const int64_t at = q.first_column + j;
      if (p_.grad_key.data)
        write_row(k, c_.size, static_cast<T>(kLn2), head_row<S>(p_.grad_key, q.batch, group, at));
      if (p_.grad_value.data)
        write_row(v, c_.value_size, weight_scale(), head_row<S>(p_.grad_value, q.batch, group, at));
    }
  }

  void add_extra(const T* parts, int64_t size, S* out, T by) const {
    if (!out) return;
    const int64_t count = c_.groups * c_.extra * size;
    for (int64_t i = 0; i < count; ++i) {
      T total(0);
      for (int64_t b = 0; b < c_.batch; ++b) total += parts[b * count + i];
      narrow(total * by, out + i);
    }
  }

  // ds summed over the dimensions in which a mask is broadcast; its blocks are tasks.
  void mask_gradient(const Parallel& parallel, bool worth_it, const int64_t (&sizes)[4], S* out) const {
    const bool by_row = sizes[2] > 1, by_column = sizes[3] > 1;
    const int64_t row_blocks = by_row ? blocks_.count : 1;
    const int64_t column_blocks = by_column ? ceil_div(c_.columns, column_block_) : 1;
    parallel(sizes[0] * sizes[1] * row_blocks * column_blocks, worth_it,
             [&](int64_t begin, int64_t end, int thread) {
               const Room r = room_of(thread);
               for (int64_t i = begin; i < end; ++i) {
                 const int64_t column = i % column_blocks * column_block_,
                               row = i / column_blocks % row_blocks * blocks_.height;
                 const int64_t head = i / (column_blocks * row_blocks) % sizes[1];
                 const int64_t batch = i / (column_blocks * row_blocks * sizes[1]);
                 T* total = r.grad_query;  // [R, pitch]
                 std::memset(total, 0, blocks_.height * pitch_ * sizeof(T));
                 for (int64_t b = sizes[0] > 1 ? batch : 0; b < (sizes[0] > 1 ? batch + 1 : c_.batch); ++b)
                   for (int64_t h = sizes[1] > 1 ? head : 0; h < (sizes[1] > 1 ? head + 1 : c_.heads); ++h)
                     for (int64_t m = by_row ? row : 0; m < (by_row ? row + 1 : c_.rows); m += blocks_.height)
                       add_ds(Sequence(c_, b), h, m, by_row, by_column ? column : 0,
                              by_column ? minimum(c_.columns, column + column_block_) : c_.columns, by_column,
                              total, r);
                 const int64_t rows = by_row ? minimum(blocks_.height, c_.rows - row) : 1;
                 const int64_t columns = by_column ? minimum(column_block_, c_.columns - column) : 1;
                 for (int64_t m = 0; m < rows; ++m) {
                   const int64_t at = ((batch * sizes[1] + head) * sizes[2] + row + m) * sizes[3] + column;
                   for (int64_t k = 0; k < columns; k += Vec<T>::size)
                     Vec<T>::load(total + m * pitch_ + k).store(out + at + k, columns - k);
                 }
               }
             });
  }

  // One block of rows of a head, columns [begin, end), added to total[by_row ? rows : 1][by_column ? columns
  // : 1].
  void add_ds(const Sequence& q, int64_t head, int64_t row, bool by_row, int64_t begin, int64_t end,
              bool by_column, T* total, const Room& r) const {
    const int64_t rows = minimum(blocks_.height, q.rows - row);
    load_rows(q, head, row, rows, r);
    for (int64_t j = begin; j < end; j += column_block_) {
      const int64_t count = minimum(column_block_, end - j);
      const bool complete = count == q.columns + c_.extra;
      make_weights(q, head, row, rows, j, count, complete, r);
      make_ds(q, head, row, rows, j, count, complete, r);
      for (int64_t i = 0; i < rows; ++i) {
        const T* ds = r.ds + i * pitch_;
        T* to = total + (by_row ? i : 0) * pitch_;
        if (by_column) {
          for (int64_t k = 0; k < count; k += Vec<T>::size)
            (Vec<T>::load(to + k) + Vec<T>::load(ds + k)).store(to + k);
        } else {
          for (int64_t k = 0; k < count; ++k) *to += ds[k];
        }
      }
    }
  }

  const AttentionBackward& p_;
  const Attention& c_;
  const PackedPlaces<T> places_;
  const KeyBias<T, S> key_bias_;
  const int64_t all_columns_;
  const RowBlocks blocks_;
  const int64_t column_block_, pitch_, q_pitch_, v_pitch_;
  int64_t pack_parts_, parts_, part_columns_, thread_bytes_;
  T *key_panels_, *value_panels_, *keys_, *delta_, *subtract_, *factor_, *partial_, *extra_keys_,
      *extra_values_;
  bool* finite_;
  char* base_;
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
