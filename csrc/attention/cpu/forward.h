// Attention on the CPU, forward: o = softmax(scale q k^T + mask) v, tile by tile.
//
// A task is a block of rows of one head (all heads, where their weights are averaged). Keys lie packed in
// panels of columns, values in rows, both once for all tasks (pack.h). For each block of columns:
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

template <class S, class Data>
auto* head_row(const HeadRowsOf<Data>& t, int64_t batch, int64_t head, int64_t row) {
  return typed<S>(t.data, batch * t.batch_stride + head * t.head_stride + row * t.row_stride);
}

// Rows [row, row + rows) of a head.
template <class S>
Source<S> rows_of(const HeadRows& t, const Sequence& q, int64_t head, int64_t row, int64_t rows,
                  int64_t size) {
  return {head_row<S>(t, q.batch, head, q.first_row + row), t.row_stride, rows, nullptr, 0, size};
}

// Columns of a key head, and the extra ones.
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

// What both directions share: how rows and columns are cut, and where keys and values lie packed.
template <class T, class S>
struct AttentionPass {
  const Attention& c;
  const PackedPlaces<T> places;
  const KeyBias<T, S> key_bias;
  const int64_t all_columns;
  const RowBlocks blocks;
  const int64_t column_block, pitch, q_pitch, v_pitch, pack_parts;
  bool* finite_parts;  // of the rows that are packed
  T* key_panels;

  AttentionPass(const Attention& call, int64_t most_rows, int64_t most_columns, Carver& shared)
      : c(call),
        places{call},
        key_bias(call, shared),
        all_columns(longest_columns(call)),
        blocks(longest_rows(call), most_rows),
        column_block(minimum(most_columns, places.panels_of(maximum(1, all_columns)) * kPanelColumns<T>)),
        pitch(column_block + Vec<T>::size),
        q_pitch(padded<T>(c.size)),
        v_pitch(padded<T>(c.value_size)),
        pack_parts(ceil_div(all_columns, kPackedColumns)),
        finite_parts(shared.take<bool>(c.sequences * c.groups * pack_parts)),
        key_panels(shared.take<T>(places.all_panels() * c.size * kPanelColumns<T>)) {}

  // pack(sequence, key head, begin, end) for each part of the columns; it says whether all rows are finite.
  template <class F>
  void pack(const Parallel& parallel, bool worth_it, const F& pack_part) const {
    parallel(c.sequences * c.groups * pack_parts, worth_it, [&](int64_t first, int64_t last, int) {
      for (int64_t i = first; i < last; ++i) {
        const Sequence q(c, i / (c.groups * pack_parts));
        const int64_t begin = i % pack_parts * kPackedColumns;
        const int64_t end = minimum(q.columns + c.extra, begin + kPackedColumns);
        finite_parts[i] = begin >= end || pack_part(q, i / pack_parts % c.groups, begin, end);
      }
    });
  }

  bool all_finite(const Sequence& q, int64_t group) const {
    const bool* parts = finite_parts + (q.index * c.groups + group) * pack_parts;
    for (int64_t i = 0; i < pack_parts; ++i)
      if (!parts[i]) return false;
    return true;
  }

  T* panels_of(T* panels, const Sequence& q, int64_t group, int64_t size) const {
    return panels + places.panels(q, group) * size * kPanelColumns<T>;
  }

  // Rows of q, scaled.
  void load_query(const Sequence& q, int64_t head, int64_t row, int64_t rows, T* query) const {
    pack_rows(rows_of<S>(c.query, q, head, row, rows, c.size), 0, rows, q_pitch, query,
              static_cast<T>(c.scale * kLog2e));
  }

  // What weights are multiplied by, those that dropout keeps.
  T weight_scale() const { return static_cast<T>(c.dropout ? c.dropout_scale : 1.); }
};

template <class T, class S>
class AttentionForwardKernel : AttentionPass<T, S> {
  using Base = AttentionPass<T, S>;
  using Base::c, Base::places, Base::key_bias, Base::all_columns, Base::blocks, Base::key_panels;
  using Base::column_block, Base::pitch, Base::q_pitch, Base::v_pitch;

 public:
  AttentionForwardKernel(const AttentionForward& p, int threads, Carver& shared)
      : Base(p.call, most_rows(p), keeps_weights(p) ? INT64_MAX : kColumnBlock, shared),
        p_(p),
        keeps_weights_(keeps_weights(p)),
        values_(shared.take<T>(places.all_rows() * v_pitch)),
        threads_(threads, shared, [&](Carver& own) { buffers(own); }) {}

  void run(const Parallel& parallel) const {
    key_bias.fill(c);
    const int64_t products = c.sequences * c.heads * longest_rows(c) * all_columns * c.size;
    const bool worth_it = products > kSerialProducts;
    this->pack(parallel, worth_it, [&](const Sequence& q, int64_t group, int64_t begin, int64_t end) {
      pack_panels_of_columns(source_of<S>(c, c.key, c.extra_key, c.size, q, group), begin, end,
                             this->panels_of(key_panels, q, group, c.size));
      return pack_rows(source_of<S>(c, c.value, c.extra_value, c.value_size, q, group), begin, end, v_pitch,
                       values_ + places.rows(q, group) * v_pitch);
    });
    const bool mean = p_.returned == ReturnedWeights::mean;
    const int64_t heads = mean ? 1 : c.heads;
    parallel(c.sequences * heads * blocks.count, worth_it, [&](int64_t begin, int64_t end, int thread) {
      Carver own = threads_.of(thread);
      const Buffers r = buffers(own);
      for (int64_t i = begin; i < end; ++i) {
        const Sequence q(c, i / (heads * blocks.count));
        const int64_t head = i / blocks.count % heads, row = i % blocks.count * blocks.height;
        const int64_t rows = minimum(blocks.height, q.rows - row);
        if (rows <= 0) continue;
        if (!mean) {
          attend(q, head, row, rows, r);
          continue;
        }
        std::memset(r.mean, 0, rows * pitch * sizeof(T));
        for (int64_t h = 0; h < c.heads; ++h) attend(q, h, row, rows, r);
        write_weights(r.mean, q.batch * c.rows + row, rows, q.columns + c.extra);
      }
    });
  }

 private:
  struct Buffers {  // of a thread
    T *query, *scores, *output, *mean, *largest, *total;
  };

  static bool keeps_weights(const AttentionForward& p) { return p.returned != ReturnedWeights::none; }
  static int64_t most_rows(const AttentionForward& p) {
    if (!keeps_weights(p)) return kRowBlock;
    const int64_t bytes = 2 * maximum(1, longest_columns(p.call)) * int64_t{sizeof(T)};
    return maximum(6, minimum(kRowBlock, kScoreBytes / bytes / 6 * 6));
  }

  Buffers buffers(Carver& own) const {
    const int64_t R = blocks.height;
    Buffers r;
    r.query = own.take<T>(R * q_pitch);
    r.scores = own.take<T>(R * pitch);
    r.output = own.take<T>(R * v_pitch);
    r.mean = own.take<T>(p_.returned == ReturnedWeights::mean ? R * pitch : 0);
    r.largest = own.take<T>(R);
    r.total = own.take<T>(R);
    return r;
  }

  // Rows [row, row + rows) of a head.
  void attend(const Sequence& q, int64_t head, int64_t row, int64_t rows, const Buffers& r) const {
    const int64_t group = head / (c.heads / c.groups), columns = q.columns + c.extra;
    this->load_query(q, head, row, rows, r.query);
    const bool finite = this->all_finite(q, group);
    const Columns seen = seen_columns(c, row, row + rows, key_bias.within(q));
    bool begun = false;
    for (int64_t i = 0; i < rows; ++i) r.largest[i] = -kInfinity<T>, r.total[i] = T(0);
    // Whole panels from the first that is seen, as far as rows see; returned weights and extra columns need all.
    const bool all = keeps_weights_ || c.extra > 0;
    const int64_t end = all ? columns : seen.end;
    for (int64_t j = all ? 0 : seen.begin / kPanelColumns<T> * kPanelColumns<T>; j < end; j += column_block) {
      const int64_t count = minimum(column_block, end - j);
      if (!keeps_weights_ && (j >= seen.end || j + count <= seen.begin) && j + count <= q.columns) continue;
      scores(q, head, group, row, rows, j, count, seen, r);
      softmax(q, head, row, rows, j, count, begun, r);
      if (keeps_weights_) take_weights(q, head, row, rows, count, r);
      const T* values = values_ + (places.rows(q, group) + j) * v_pitch;
      const Strided<T> weights{r.scores, pitch, 1};
      if (finite) {
        multiply(rows, v_pitch / Vec<T>::size, count, weights, values, v_pitch, r.output, v_pitch,
                 begun ? Into::add : Into::overwrite);
      } else {
        if (!begun) std::memset(r.output, 0, rows * v_pitch * sizeof(T));
        multiply_kept(rows, v_pitch / Vec<T>::size, count, weights, values, v_pitch, r.output, v_pitch);
      }
      begun = true;
    }
    if (!begun) std::memset(r.output, 0, rows * v_pitch * sizeof(T));
    write(q, head, row, rows, r);
  }

  // [rows, count] of scores from column j.
  void scores(const Sequence& q, int64_t head, int64_t group, int64_t row, int64_t rows, int64_t j,
              int64_t count, Columns seen, const Buffers& r) const {
    constexpr int64_t P = kPanelColumns<T>;
    const T* panels = this->panels_of(key_panels, q, group, c.size);
    for (int64_t k = 0; k < count; k += P) {
      const bool unseen = j + k + P <= seen.begin || j + k >= seen.end;
      if (unseen && j + k + P <= q.columns) continue;  // what is there is replaced by -inf
      multiply_panel<kWide>(rows, c.size, Strided<T>{r.query, q_pitch, 1}, panels + (j + k) * c.size, P,
                            r.scores + k, pitch, Into::overwrite);
    }
    if (plain_scores(c) && count % Vec<T>::size == 0) return;
    for (int64_t i = 0; i < rows; ++i)
      finish_scores<T, S>(c, q, head, row + i, j, count, key_bias.of(q), r.scores + i * pitch, nullptr);
  }

  void softmax(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t j, int64_t count,
               bool begun, const Buffers& r) const {
    const int64_t whole = padded<T>(count);
    for (int64_t i = 0; i < rows; ++i) {
      T* s = r.scores + i * pitch;
      const T before = r.largest[i], block = largest_of(s, whole);
      const T largest = block > before ? block : before;
      if (largest == -kInfinity<T>) {
        // Nothing kept so far, or a NaN, which no comparison sees.
        r.total[i] += exp2_row(s, whole, T(0));
        if (begun) scale_row(r.output + i * v_pitch, v_pitch, T(0), r.output + i * v_pitch);
        continue;
      }
      if (largest != before) {
        T down[Vec<T>::size];
        exp2(Vec<T>(before - largest)).store(down);
        r.total[i] *= down[0];
        if (begun) scale_row(r.output + i * v_pitch, v_pitch, down[0], r.output + i * v_pitch);
        r.largest[i] = largest;
      }
      r.total[i] += exp2_row(s, whole, largest);
      if (c.dropout) drop_weights(c, q.index, head, row + i, j, count, s);
    }
  }

  T inverse(T total) const { return total == T(0) ? T(0) : T(1) / total; }

  // Weights of all columns, final sums known.
  void take_weights(const Sequence& q, int64_t head, int64_t row, int64_t rows, int64_t count,
                    const Buffers& r) const {
    const T share = this->weight_scale();
    if (p_.returned == ReturnedWeights::heads) {
      for (int64_t i = 0; i < rows; ++i) {
        S* out = static_cast<S*>(p_.weights) + ((q.batch * c.heads + head) * c.rows + row + i) * count;
        scale_row(r.scores + i * pitch, count, inverse(r.total[i]) * share, out);
      }
      return;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const T* s = r.scores + i * pitch;
      T* mean = r.mean + i * pitch;
      const Vec<T> by(inverse(r.total[i]) * share / static_cast<T>(c.heads));
      for (int64_t j = 0; j < count; j += Vec<T>::size)
        (Vec<T>::load(mean + j) + Vec<T>::load(s + j) * by).store(mean + j);
    }
  }

  void write_weights(const T* mean, int64_t first, int64_t rows, int64_t columns) const {
    for (int64_t i = 0; i < rows; ++i) {
      S* out = static_cast<S*>(p_.weights) + (first + i) * columns;
      for (int64_t j = 0; j < columns; j += Vec<T>::size)
        Vec<T>::load(mean + i * pitch + j).store(out + j, columns - j);
    }
  }

  void write(const Sequence& q, int64_t head, int64_t row, int64_t rows, const Buffers& r) const {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = q.first_row + row + i;
      S* out = head_row<S>(p_.output, q.batch, head, at);
      scale_row(r.output + i * v_pitch, c.value_size, inverse(r.total[i]) * this->weight_scale(), out);
      if (!p_.lse) continue;
      const T total = r.total[i];
      static_cast<T*>(p_.lse)[(q.batch * c.heads + head) * c.rows + at] =
          total == T(0) ? -kInfinity<T>
                        : static_cast<T>(static_cast<double>(r.largest[i]) * kLn2 + __builtin_log(total));
    }
  }

  const AttentionForward& p_;
  const bool keeps_weights_;
  T* const values_;
  const ThreadParts threads_;
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
