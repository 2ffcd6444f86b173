// Attention on the CPU, backward.
//
//   dv_j += p z g      dk_j += scale ds q      dq_i += scale ds k      p, ds: backward_tiles.h
//
// A task is a part of the columns of one key head of one sequence (all of them, where there are heads enough
// for any number of threads): its dk and dv stay with it while all rows of all its query heads go past.
// Parts, and so all sums, depend on the shape alone: the same bits for any number of threads. For a block of
// rows and columns: five products, of which s and dp come from panels (pack.h), the others from rows.
//
// Gradients of masks, which sum over samples, heads or rows, are a pass of their own over the masks' blocks.
// Bytes: q, g once for each part, keys and values in cache. Flops: 2 L S (3 D + 2 V) a head.
#pragma once

#include "attention/cpu/backward_tiles.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kBackwardTasks = 8;  // with fewer heads, columns are cut into parts

template <class T, class S>
class AttentionBackwardKernel {
 public:
  AttentionBackwardKernel(const AttentionBackward& p, int threads, Carver& shared)
      : p_(p),
        c_(p.call),
        tiles_(p, shared),
        part_columns_(columns_of_a_part()),
        parts_(maximum(1, ceil_div(tiles_.all_columns, part_columns_))),
        partial_(parts_ > 1 ? shared.take<T>(parts_ * c_.batch * c_.heads * c_.rows * tiles_.q_pitch)
                            : nullptr),
        extra_keys_(shared.take<T>(c_.batch * c_.groups * c_.extra * c_.size)),
        extra_values_(shared.take<T>(c_.batch * c_.groups * c_.extra * c_.value_size)),
        threads_(threads, shared, [&](Carver& own) { buffers(own); }) {}

  void run(const Parallel& parallel) const {
    const int64_t products = c_.sequences * c_.heads * longest_rows(c_) * tiles_.all_columns * c_.size;
    const bool worth_it = products > kSerialProducts / 2;
    const int64_t groups = c_.groups;
    tiles_.prepare(parallel, worth_it, [&](int thread) { return buffers_of(thread); });
    if (p_.grad_query.data || p_.grad_key.data || p_.grad_value.data || p_.grad_extra_key ||
        p_.grad_extra_value) {
      parallel(c_.sequences * groups * parts_, worth_it, [&](int64_t begin, int64_t end, int thread) {
        const Buffers r = buffers_of(thread);
        for (int64_t i = begin; i < end; ++i)
          head_gradients(Sequence(c_, i / (groups * parts_)), i / parts_ % groups, i % parts_, r);
      });
      if (parts_ > 1 && p_.grad_query.data) add_partials(parallel, worth_it);
      add_extra(extra_keys_, c_.size, static_cast<S*>(p_.grad_extra_key), static_cast<T>(kLn2));
      add_extra(extra_values_, c_.value_size, static_cast<S*>(p_.grad_extra_value), tiles_.weight_scale());
    }
    if (p_.grad_mask) mask_gradient(parallel, worth_it, p_.mask_sizes, static_cast<S*>(p_.grad_mask));
    const int64_t key_mask_sizes[4] = {c_.batch, 1, 1, c_.columns};
    if (p_.grad_key_mask)
      mask_gradient(parallel, worth_it, key_mask_sizes, static_cast<S*>(p_.grad_key_mask));
  }

 private:
  struct Buffers : BackwardTiles<T, S>::Buffers {
    T *grad_query, *grad_keys, *grad_values;
  };

  int64_t columns_of_a_part() const {
    const int64_t blocks = maximum(1, ceil_div(tiles_.all_columns, tiles_.column_block));
    const int64_t heads = maximum(1, c_.sequences * c_.groups);
    const int64_t parts = heads >= kBackwardTasks ? 1 : minimum(blocks, ceil_div(kBackwardTasks, heads));
    return ceil_div(blocks, parts) * tiles_.column_block;
  }

  Buffers buffers(Carver& own) const {
    const int64_t R = tiles_.blocks.height, columns = minimum(part_columns_, tiles_.all_columns);
    Buffers r{tiles_.buffers(own), nullptr, nullptr, nullptr};
    r.grad_query = own.take<T>(maximum(R * tiles_.q_pitch, R * tiles_.pitch));
    r.grad_keys = own.take<T>(columns * tiles_.q_pitch);
    r.grad_values = own.take<T>(columns * tiles_.v_pitch);
    return r;
  }
  Buffers buffers_of(int thread) const {
    Carver own = threads_.of(thread);
    return buffers(own);
  }

  // dq, dk and dv of the columns of one part of a key head.
  void head_gradients(const Sequence& q, int64_t group, int64_t part, const Buffers& r) const {
    const int64_t columns = q.columns + c_.extra, begin = part * part_columns_;
    const int64_t end = minimum(columns, begin + part_columns_), share = c_.heads / c_.groups;
    if (begin < end) {
      std::memset(r.grad_keys, 0, (end - begin) * tiles_.q_pitch * sizeof(T));
      std::memset(r.grad_values, 0, (end - begin) * tiles_.v_pitch * sizeof(T));
    }
    const bool finite = tiles_.all_finite(q, group);
    for (int64_t head = group * share; head < (group + 1) * share; ++head)
      for (int64_t row = 0; row < q.rows; row += tiles_.blocks.height) {
        const int64_t rows = minimum(tiles_.blocks.height, q.rows - row);
        tiles_.load_rows(q, head, row, rows, r);
        std::memset(r.grad_query, 0, rows * tiles_.q_pitch * sizeof(T));
        const Columns seen = seen_columns(c_, row, row + rows, tiles_.key_bias.within(q));
        constexpr int64_t P = kPanelColumns<T>;
        const int64_t last = c_.extra ? end : minimum(end, seen.end);
        for (int64_t j = c_.extra ? begin : maximum(begin, seen.begin / P * P); j < last;
             j += tiles_.column_block) {
          const int64_t count = minimum(tiles_.column_block, last - j);
          if ((j + count <= seen.begin || j >= seen.end) && j + count <= q.columns) continue;
          const bool complete = c_.extra ? count == columns : j <= seen.begin && j + count >= seen.end;
          block(q, head, row, rows, j, count, begin, finite, complete, r);
        }
        write_query(q, head, row, rows, part, r);
      }
    write_columns(q, group, begin, end, r);
  }

  void block(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t j, int64_t count,
             int64_t begin, bool finite, bool complete, const Buffers& r) const {
    constexpr int w = Vec<T>::size;
    tiles_.make_weights(q, head, row, rows, j, count, complete, r);
    tiles_.make_ds(q, head, row, rows, j, count, complete, r);
    const Strided<T> weights_t{r.scores, 1, tiles_.pitch}, ds_t{r.ds, 1, tiles_.pitch},
        ds{r.ds, tiles_.pitch, 1};
    if (p_.grad_value.data || p_.grad_extra_value)
      multiply(count, tiles_.v_pitch / w, rows, weights_t, r.grad, tiles_.v_pitch,
               r.grad_values + (j - begin) * tiles_.v_pitch, tiles_.v_pitch, Into::add);
    if (c_.softcap > 0) through_softcap(rows, count, r);
    if (p_.grad_key.data || p_.grad_extra_key)
      multiply(count, tiles_.q_pitch / w, rows, ds_t, r.query, tiles_.q_pitch,
               r.grad_keys + (j - begin) * tiles_.q_pitch, tiles_.q_pitch, Into::add);
    if (!p_.grad_query.data) return;
    const T* keys =
        tiles_.key_rows + (tiles_.places.rows(q, head / (c_.heads / c_.groups)) + j) * tiles_.q_pitch;
    if (finite)
      multiply(rows, tiles_.q_pitch / w, count, ds, keys, tiles_.q_pitch, r.grad_query, tiles_.q_pitch,
               Into::add);
    else
      multiply_kept(rows, tiles_.q_pitch / w, count, ds, keys, tiles_.q_pitch, r.grad_query, tiles_.q_pitch);
  }

  void through_softcap(int64_t rows, int64_t count, const Buffers& r) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < count; k += Vec<T>::size) {
        T* ds = r.ds + i * tiles_.pitch + k;
        const Vec<T> t = Vec<T>::load(r.capped + i * tiles_.pitch + k), x = Vec<T>::load(ds), zero(T(0));
        Vec<T>(x.v == zero.v ? zero.v : (x * (Vec<T>(T(1)) - t * t)).v).store(ds);
      }
  }

  void write_query(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t part,
                   const Buffers& r) const {
    if (!p_.grad_query.data) return;
    if (parts_ > 1) {
      const int64_t all = c_.batch * c_.heads * c_.rows;
      T* to = partial_ + (part * all + tiles_.row_index(q, head, row)) * tiles_.q_pitch;
      std::memcpy(to, r.grad_query, rows * tiles_.q_pitch * sizeof(T));
      return;
    }
    for (int64_t i = 0; i < rows; ++i)
      scale_row(r.grad_query + i * tiles_.q_pitch, c_.size, static_cast<T>(c_.scale),
                head_row<S>(p_.grad_query, q.batch, head, q.first_row + row + i));
  }

  // Partial dq of the parts, added up in order.
  void add_partials(const Parallel& parallel, bool worth_it) const {
    const int64_t all = c_.batch * c_.heads * c_.rows;
    parallel(all, worth_it, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        T* first = partial_ + i * tiles_.q_pitch;
        for (int64_t part = 1; part < parts_; ++part)
          for (int64_t d = 0; d < tiles_.q_pitch; d += Vec<T>::size)
            (Vec<T>::load(first + d) + Vec<T>::load(first + part * all * tiles_.q_pitch + d))
                .store(first + d);
        scale_row(first, c_.size, static_cast<T>(c_.scale),
                  head_row<S>(p_.grad_query, i / (c_.heads * c_.rows), i / c_.rows % c_.heads, i % c_.rows));
      }
    });
  }

  // dk was made from q times scale log2(e), dv from weights without dropout's scale.
  void write_columns(const Sequence& q, int64_t group, int64_t begin, int64_t end, const Buffers& r) const {
    for (int64_t j = begin; j < end; ++j) {
      const T *k = r.grad_keys + (j - begin) * tiles_.q_pitch,
              *v = r.grad_values + (j - begin) * tiles_.v_pitch;
      if (j >= q.columns) {
        const int64_t x = (q.batch * c_.groups + group) * c_.extra + j - q.columns;
        std::memcpy(extra_keys_ + x * c_.size, k, c_.size * sizeof(T));
        std::memcpy(extra_values_ + x * c_.value_size, v, c_.value_size * sizeof(T));
        continue;
      }
      const int64_t at = q.first_column + j;
      if (p_.grad_key.data)
        scale_row(k, c_.size, static_cast<T>(kLn2), head_row<S>(p_.grad_key, q.batch, group, at));
      if (p_.grad_value.data)
        scale_row(v, c_.value_size, tiles_.weight_scale(), head_row<S>(p_.grad_value, q.batch, group, at));
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
    const int64_t row_blocks = by_row ? tiles_.blocks.count : 1;
    const int64_t column_blocks = by_column ? ceil_div(c_.columns, tiles_.column_block) : 1;
    parallel(sizes[0] * sizes[1] * row_blocks * column_blocks, worth_it,
             [&](int64_t begin, int64_t end, int thread) {
               const Buffers r = buffers_of(thread);
               for (int64_t i = begin; i < end; ++i) {
                 const int64_t column = i % column_blocks * tiles_.column_block,
                               row = i / column_blocks % row_blocks * tiles_.blocks.height;
                 const int64_t head = i / (column_blocks * row_blocks) % sizes[1];
                 const int64_t batch = i / (column_blocks * row_blocks * sizes[1]);
                 T* total = r.grad_query;  // [R, pitch]
                 std::memset(total, 0, tiles_.blocks.height * tiles_.pitch * sizeof(T));
                 for (int64_t b = sizes[0] > 1 ? batch : 0; b < (sizes[0] > 1 ? batch + 1 : c_.batch); ++b)
                   for (int64_t h = sizes[1] > 1 ? head : 0; h < (sizes[1] > 1 ? head + 1 : c_.heads); ++h)
                     for (int64_t m = by_row ? row : 0; m < (by_row ? row + 1 : c_.rows);
                          m += tiles_.blocks.height)
                       add_ds(Sequence(c_, b), h, m, by_row, by_column ? column : 0,
                              by_column ? minimum(c_.columns, column + tiles_.column_block) : c_.columns,
                              by_column, total, r);
                 const int64_t rows = by_row ? minimum(tiles_.blocks.height, c_.rows - row) : 1;
                 const int64_t columns = by_column ? minimum(tiles_.column_block, c_.columns - column) : 1;
                 for (int64_t m = 0; m < rows; ++m) {
                   const int64_t at = ((batch * sizes[1] + head) * sizes[2] + row + m) * sizes[3] + column;
                   for (int64_t k = 0; k < columns; k += Vec<T>::size)
                     Vec<T>::load(total + m * tiles_.pitch + k).store(out + at + k, columns - k);
                 }
               }
             });
  }

  // One block of rows of a head, columns [begin, end), added to total, whose rows and columns are one where a mask
  // is broadcast.
  void add_ds(const Sequence& q, int64_t head, int64_t row, bool by_row, int64_t begin, int64_t end,
              bool by_column, T* total, const Buffers& r) const {
    const int64_t rows = minimum(tiles_.blocks.height, q.rows - row);
    tiles_.load_rows(q, head, row, rows, r);
    for (int64_t j = begin; j < end; j += tiles_.column_block) {
      const int64_t count = minimum(tiles_.column_block, end - j);
      const bool complete = count == q.columns + c_.extra;
      tiles_.make_weights(q, head, row, rows, j, count, complete, r);
      tiles_.make_ds(q, head, row, rows, j, count, complete, r);
      for (int64_t i = 0; i < rows; ++i) {
        const T* ds = r.ds + i * tiles_.pitch;
        T* to = total + (by_row ? i : 0) * tiles_.pitch;
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
  const BackwardTiles<T, S> tiles_;
  const int64_t part_columns_, parts_;
  T *const partial_, *const extra_keys_, *const extra_values_;
  const ThreadParts threads_;
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
