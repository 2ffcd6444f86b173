// Attention on the CPU, forward: o = softmax(scale q k^T + mask) v, tile by tile.
//
// A task is a block of rows of one head (all heads, where their weights are averaged). Keys lie packed in
// panels of columns, values in rows, both once for all tasks (attention_pack.h). For each block of columns:
//
//   scores    [R, N] = q [R, D] panels [D, N]
//   weights   2^(s - largest), the largest so far: sums and output so far are scaled down when it grows
//   output    [R, V] += weights [R, N] values [N, V]
//
// Weights that are returned need the last row sum, so that then one block holds all columns and R is smaller.
// Bytes: q, k, v and o once, k and v twice more for the packed copy, which is read from the second- or
// third-level cache once for each block of rows. Flops: 2 L S (D + V) a head.
#pragma once

#include "attention/cpu/dropout.h"
#include "attention/cpu/scores.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int64_t kRowBlock = 192;
constexpr int64_t kColumnBlock = 512;
constexpr int64_t kPackedColumns = 512;       // a task of packing
constexpr int64_t kScoreBytes = 512 << 10;    // of a block of rows whose weights are returned
constexpr int64_t kSerialProducts = 1 << 18;  // below this, threads cost more than they save

// Blocks of rows of nearly equal height.
struct RowBlocks {
  int64_t height, count;
  RowBlocks(int64_t rows, int64_t most) {
    count = ceil_div(rows, most);
    height = count ? ceil_div(ceil_div(rows, count), 6) * 6 : 0;
    count = height ? ceil_div(rows, height) : 0;
  }
};

inline int64_t longest_rows(const Attention& c) { return c.cu_seqlens_q ? c.longest_q : c.rows; }
inline int64_t longest_columns(const Attention& c) {
  return (c.cu_seqlens_k ? c.longest_k : c.columns) + c.extra;
}

// Where the packed columns of each sequence and key head lie: `panels` and `rows` count from the start.
template <class T>
struct PackedPlaces {
  const Attention& c;

  int64_t panels_of(int64_t columns) const { return ceil_div(columns, kPanelColumns<T>); }
  int64_t panels(const Sequence& q, int64_t group) const {
    const int64_t own = panels_of(q.columns + c.extra);
    const int64_t before = c.cu_seqlens_k ? q.first_column / kPanelColumns<T> + q.index : q.index * own;
    return before * c.groups + group * own;
  }
  int64_t all_panels() const {
    if (c.cu_seqlens_k) return (c.columns / kPanelColumns<T> + c.sequences) * c.groups;
    return c.batch * c.groups * panels_of(c.columns + c.extra);
  }
  int64_t rows(const Sequence& q, int64_t group) const {
    const int64_t own = q.columns + c.extra;
    return (c.cu_seqlens_k ? q.first_column : q.index * own) * c.groups + group * own;
  }
  int64_t all_rows() const {
    return c.groups * (c.cu_seqlens_k ? c.columns : c.batch * (c.columns + c.extra));
  }
};

template <class S>
const S* head_row(const HeadRows& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const S*>(t.data) + batch * t.batch_stride + head * t.head_stride + row * t.row_stride;
}
template <class S>
S* head_row(const HeadRowsOut& t, int64_t batch, int64_t head, int64_t row) {
  return static_cast<S*>(t.data) + batch * t.batch_stride + head * t.head_stride + row * t.row_stride;
}

template <class S>
Source<S> source_of(const Attention& c, const HeadRows& t, const void* extra, int64_t size, const Sequence& q,
                    int64_t group) {
  const S* more = static_cast<const S*>(extra) + (extra ? group * c.extra * size : 0);
  return {head_row<S>(t, q.batch, group, q.first_column), t.row_stride, q.columns, more, c.extra, size};
}

// c[R, V] += a[R, N] b[N, V], leaving out what a is 0 for: b may hold NaN there.
template <class T>
void multiply_kept(int64_t rows, int64_t vectors, int64_t K, Strided<T> a, const T* b, int64_t b_stride, T* c,
                   int64_t c_stride) {
  constexpr int w = Vec<T>::size;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < K; ++k) {
      const T x = a.data[r * a.row_stride + k * a.k_stride];
      if (x == T(0)) continue;
      for (int64_t v = 0; v < vectors; ++v) {
        T* to = c + r * c_stride + v * w;
        (Vec<T>::load(to) + Vec<T>(x) * Vec<T>::load(b + k * b_stride + v * w)).store(to);
      }
    }
}

// log2(e) times the key mask of each sequence, and the columns that it keeps.
template <class T, class S>
struct KeyBias {
  T* data;
  int64_t pitch;
  Columns* kept;

  KeyBias(const Attention& c, Carver& shared) : pitch(padded<T>(longest_columns(c)) + Vec<T>::size) {
    data = c.key_mask.data ? shared.take<T>(c.sequences * pitch) : nullptr;
    kept = c.key_mask.data ? shared.take<Columns>(c.sequences) : nullptr;
  }
  void fill(const Attention& c) const {
    if (!data) return;
    for (int64_t n = 0; n < c.sequences; ++n)
      kept[n] = widen_key_mask<T, S>(c, Sequence(c, n), data + n * pitch);
  }
  const T* of(const Sequence& q) const { return data ? data + q.index * pitch : nullptr; }
  Columns within(const Sequence& q) const { return data ? kept[q.index] : Columns{0, q.columns}; }
};

template <class T, class S>
class AttentionForwardKernel {
 public:
  AttentionForwardKernel(const AttentionForward& p, int threads, Carver& shared)
      : p_(p),
        c_(p.call),
        places_{p.call},
        key_bias_(p.call, shared),
        all_columns_(longest_columns(p.call)),
        keeps_weights_(p.returned != ReturnedWeights::none),
        blocks_(longest_rows(p.call), row_limit()),
        column_block_(keeps_weights_ ? places_.panels_of(maximum(1, all_columns_)) * kPanelColumns<T>
                                     : minimum(kColumnBlock, places_.panels_of(maximum(1, all_columns_)) *
                                                                 kPanelColumns<T>)),
        pitch_(column_block_ + Vec<T>::size),
        q_pitch_(padded<T>(c_.size)),
        v_pitch_(padded<T>(c_.value_size)) {
    parts_ = ceil_div(all_columns_, kPackedColumns);
    panels_ = shared.take<T>(places_.all_panels() * c_.size * kPanelColumns<T>);
    values_ = shared.take<T>(places_.all_rows() * v_pitch_);
    finite_ = shared.take<bool>(c_.sequences * c_.groups * parts_);
    const int64_t R = blocks_.height;
    threads_bytes_ = shared.bytes;
    for (int t = 0; t < threads; ++t) room(t, shared, R);
    threads_bytes_ = threads ? (shared.bytes - threads_bytes_) / threads : 0;
    base_ = shared.base ? shared.base + shared.bytes - threads * threads_bytes_ : nullptr;
  }

  void run(const Parallel& parallel) const {
    key_bias_.fill(c_);
    const int64_t products = c_.sequences * c_.heads * longest_rows(c_) * all_columns_ * c_.size;
    const bool worth_it = products > kSerialProducts;
    parallel(c_.sequences * c_.groups * parts_, worth_it, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i)
        pack(i / (c_.groups * parts_), i / parts_ % c_.groups, i % parts_);
    });
    const bool mean = p_.returned == ReturnedWeights::mean;
    const int64_t heads = mean ? 1 : c_.heads;
    parallel(c_.sequences * heads * blocks_.count, worth_it, [&](int64_t begin, int64_t end, int thread) {
      Carver own(base_ ? base_ + thread * threads_bytes_ : nullptr);
      const Room r = room(thread, own, blocks_.height);
      for (int64_t i = begin; i < end; ++i) {
        const Sequence q(c_, i / (heads * blocks_.count));
        const int64_t head = i / blocks_.count % heads, row = i % blocks_.count * blocks_.height;
        const int64_t rows = minimum(blocks_.height, q.rows - row);
        if (rows <= 0) continue;
        if (!mean) {
          attend(q, head, row, rows, r);
          continue;
        }
        std::memset(r.mean, 0, rows * pitch_ * sizeof(T));
        for (int64_t h = 0; h < c_.heads; ++h) attend(q, h, row, rows, r);
        write_weights(r.mean, q.batch * c_.rows + row, rows, q.columns + c_.extra);
      }
    });
  }

 private:
  struct Room {  // of a thread
    T *query, *scores, *output, *mean, *largest, *total;
  };

  int64_t row_limit() const {
    if (!keeps_weights_) return kRowBlock;
    return maximum(
        6, minimum(kRowBlock, kScoreBytes / (2 * maximum(1, all_columns_) * int64_t{sizeof(T)}) / 6 * 6));
  }

  Room room(int, Carver& own, int64_t R) const {
    Room r;
    r.query = own.template take<T>(R * q_pitch_);
    r.scores = own.template take<T>(R * pitch_);
    r.output = own.template take<T>(R * v_pitch_);
    r.mean = own.template take<T>(p_.returned == ReturnedWeights::mean ? R * pitch_ : 0);
    r.largest = own.template take<T>(R);
    r.total = own.template take<T>(R);
    return r;
  }

  void pack(int64_t n, int64_t group, int64_t part) const {
    const Sequence q(c_, n);
    const int64_t columns = q.columns + c_.extra, begin = part * kPackedColumns;
    const int64_t end = minimum(columns, begin + kPackedColumns);
    finite_[(n * c_.groups + group) * parts_ + part] = true;
    if (begin >= end) return;
    const auto keys = source_of<S>(c_, c_.key, c_.extra_key, c_.size, q, group);
    T* panels = panels_ + places_.panels(q, group) * c_.size * kPanelColumns<T>;
    for (int64_t i = begin / kPanelColumns<T>; i * kPanelColumns<T> < end; ++i)
      pack_panel_of_columns(keys, i, panels);
    const auto values = source_of<S>(c_, c_.value, c_.extra_value, c_.value_size, q, group);
    T* rows = values_ + places_.rows(q, group) * v_pitch_;
    finite_[(n * c_.groups + group) * parts_ + part] = pack_rows(values, begin, end, v_pitch_, rows);
  }

  bool finite_values(const Sequence& q, int64_t group) const {
    bool all = true;
    for (int64_t i = 0; i < parts_; ++i) all = all && finite_[(q.index * c_.groups + group) * parts_ + i];
    return all;
  }

  // Rows [row, row + rows) of a head.
  void attend(const Sequence& q, int64_t head, int64_t row, int64_t rows, const Room& r) const {
    const int64_t group = head / (c_.heads / c_.groups), columns = q.columns + c_.extra;
    const Source<S> queries{head_row<S>(c_.query, q.batch, head, q.first_row + row),
                            c_.query.row_stride,
                            rows,
                            nullptr,
                            0,
                            c_.size};
    pack_rows(queries, 0, rows, q_pitch_, r.query, static_cast<T>(c_.scale * kLog2e));
    const bool finite = finite_values(q, group);
    const Columns seen = seen_columns(c_, row, row + rows, key_bias_.within(q));
    bool begun = false;
    for (int64_t i = 0; i < rows; ++i) r.largest[i] = minus_infinity<T>(), r.total[i] = T(0);
    // Whole panels from the first that is seen, as far as rows see; what is returned, and extra columns, need
    // all.
    const bool all = keeps_weights_ || c_.extra > 0;
    const int64_t end = all ? columns : seen.end;
    for (int64_t j = all ? 0 : seen.begin / kPanelColumns<T> * kPanelColumns<T>; j < end;
         j += column_block_) {
      const int64_t count = minimum(column_block_, end - j);
      if (!keeps_weights_ && (j >= seen.end || j + count <= seen.begin) && j + count <= q.columns) continue;
      scores(q, head, group, row, rows, j, count, seen, r);
      softmax(q, head, row, rows, j, count, begun, r);
      if (keeps_weights_) take_weights(q, head, row, rows, count, r);
      const T* values = values_ + (places_.rows(q, group) + j) * v_pitch_;
      const Strided<T> weights{r.scores, pitch_, 1};
      if (finite) {
        multiply(rows, v_pitch_ / Vec<T>::size, count, weights, values, v_pitch_, r.output, v_pitch_,
                 begun ? Into::add : Into::overwrite);
      } else {
        if (!begun) std::memset(r.output, 0, rows * v_pitch_ * sizeof(T));
        multiply_kept(rows, v_pitch_ / Vec<T>::size, count, weights, values, v_pitch_, r.output, v_pitch_);
      }
      begun = true;
    }
    if (!begun) std::memset(r.output, 0, rows * v_pitch_ * sizeof(T));
    write(q, head, row, rows, r);
  }

  // [rows, count] of scores from column j.
  void scores(const Sequence& q, int64_t head, int64_t group, int64_t row, int64_t rows, int64_t j,
              int64_t count, Columns seen, const Room& r) const {
    constexpr int64_t P = kPanelColumns<T>;
    const T* panels = panels_ + places_.panels(q, group) * c_.size * P;
    for (int64_t k = 0; k < count; k += P) {
      const bool unseen = j + k + P <= seen.begin || j + k >= seen.end;
      if (unseen && j + k + P <= q.columns) continue;  // what is there is replaced by -inf
      multiply_panel<kWide>(rows, c_.size, Strided<T>{r.query, q_pitch_, 1}, panels + (j + k) * c_.size, P,
                            r.scores + k, pitch_, Into::overwrite);
    }
    if (plain_scores(c_) && count % Vec<T>::size == 0) return;
    for (int64_t i = 0; i < rows; ++i)
      finish_scores<T, S>(c_, q, head, row + i, j, count, key_bias_.of(q), r.scores + i * pitch_, nullptr);
  }

  void softmax(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t j, int64_t count,
               bool begun, const Room& r) const {
    const int64_t whole = padded<T>(count);
    for (int64_t i = 0; i < rows; ++i) {
      T* s = r.scores + i * pitch_;
      const T before = r.largest[i], block = largest_of(s, whole);
      const T largest = block > before ? block : before;
      if (largest == minus_infinity<T>()) {
        // Nothing kept so far, or a NaN, which no comparison sees.
        r.total[i] += exp2_row(s, whole, T(0));
        if (begun) scale_row(r.output + i * v_pitch_, T(0));
        continue;
      }
      if (largest != before) {
        T down[Vec<T>::size];
        exp2(Vec<T>(before - largest)).store(down);
        r.total[i] *= down[0];
        if (begun) scale_row(r.output + i * v_pitch_, down[0]);
        r.largest[i] = largest;
      }
      r.total[i] += exp2_row(s, whole, largest);
      if (c_.dropout) drop_weights(c_, q.index, head, row + i, j, count, s);
    }
  }

  void scale_row(T* row, T by) const {
    for (int64_t v = 0; v < v_pitch_; v += Vec<T>::size) (Vec<T>::load(row + v) * Vec<T>(by)).store(row + v);
  }

  T inverse(T total) const { return total == T(0) ? T(0) : T(1) / total; }

  // Weights of all columns, final sums known.
  void take_weights(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t count,
                    const Room& r) const {
    const T share = static_cast<T>(c_.dropout ? c_.dropout_scale : 1.);
    if (p_.returned == ReturnedWeights::heads) {
      for (int64_t i = 0; i < rows; ++i) {
        S* out = static_cast<S*>(p_.weights) + ((q.batch * c_.heads + head) * c_.rows + row + i) * count;
        const Vec<T> by(inverse(r.total[i]) * share);
        for (int64_t j = 0; j < count; j += Vec<T>::size)
          (Vec<T>::load(r.scores + i * pitch_ + j) * by).store(out + j, count - j);
      }
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const T* s = r.scores + i * pitch_;
      T* mean = r.mean + i * pitch_;
      const Vec<T> by(inverse(r.total[i]) * share / static_cast<T>(c_.heads));
      for (int64_t j = 0; j < count; j += Vec<T>::size)
        (Vec<T>::load(mean + j) + Vec<T>::load(s + j) * by).store(mean + j);
    }
  }

  void write_weights(const T* mean, int64_t first, int64_t rows, int64_t columns) const {
    for (int64_t i = 0; i < rows; ++i) {
      S* out = static_cast<S*>(p_.weights) + (first + i) * columns;
      for (int64_t j = 0; j < columns; j += Vec<T>::size)
        Vec<T>::load(mean + i * pitch_ + j).store(out + j, columns - j);
    }
  }

  void write(const Sequence& q, int64_t head, int64_t row, int64_t rows, const Room& r) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = q.first_row + row + i;
      S* out = head_row<S>(p_.output, q.batch, head, at);
      const Vec<T> by(inverse(r.total[i]) * static_cast<T>(c_.dropout ? c_.dropout_scale : 1.));
      for (int64_t v = 0; v < c_.value_size; v += Vec<T>::size)
        (Vec<T>::load(r.output + i * v_pitch_ + v) * by).store(out + v, c_.value_size - v);
      if (!p_.lse) continue;
      const T total = r.total[i];
      static_cast<T*>(p_.lse)[(q.batch * c_.heads + head) * c_.rows + at] =
          total == T(0) ? minus_infinity<T>()
                        : static_cast<T>(static_cast<double>(r.largest[i]) * kLn2 + __builtin_log(total));
    }
  }

  const AttentionForward& p_;
  const Attention& c_;
  const PackedPlaces<T> places_;
  const KeyBias<T, S> key_bias_;
  const int64_t all_columns_;
  const bool keeps_weights_;
  const RowBlocks blocks_;
  const int64_t column_block_, pitch_, q_pitch_, v_pitch_;
  int64_t parts_, threads_bytes_;
  T *panels_, *values_;
  bool* finite_;
  char* base_;
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
