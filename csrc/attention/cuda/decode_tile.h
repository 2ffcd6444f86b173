// A block of decode.cu, where the tiling is: its rows, its share of their keys, and the scores of a tile of those.
#pragma once

#include "attention/cuda/common.h"

namespace fusednn::cuda::attention {

constexpr int kThreads = 128, kWarps = kThreads / 32, kTile = kThreads, kRows = 8;
constexpr int kResident = 3;    // blocks of a multiprocessor that ptxas is to aim at
constexpr int kChunkPacks = 8;  // of a key
template <class T>
constexpr int kChunk = kChunkPacks * kPack<T>;
template <class T>
constexpr int kKeyStride = kChunk<T> + kPack<T>;  // of staged keys, padded against bank conflicts
constexpr int kRowsAdded = 4;                     // at a time, in the keys' memory

template <class A>
struct Row {
  int64_t mask;  // offset of its first element
  Window window;
  A slope;
  int query, head;
};

// The block's shared memory.
template <class T>
struct Shared {
  using A = Arithmetic<T>;
  int width;   // D, rounded up to chunks
  T* keys;     // [kTile, kKeyStride]; at the end, sums [kRowsAdded, slices, columns], wide
  A* queries;  // [kRows, width]
  A* weights;  // [kRows, kTile]: scores at first
  A* factors;  // [kRows]: of the sums so far
  A* totals;   // [kRows, 2]: m, l
  Row<A>* rows;

  static constexpr size_t key_bytes = sizeof(T) * kTile * kKeyStride<T>;
  static_assert(key_bytes >= sizeof(A) * kRowsAdded * kThreads * kPack<T>);

  __host__ __device__ static int padded(int head_size) {
    return head_size > 0 ? ceil_div(head_size, kChunk<T>) * kChunk<T> : kChunk<T>;
  }
  __host__ __device__ static int numbers(int width) { return kRows * (width + kTile + 3); }
  static size_t bytes(int head_size) {
    return key_bytes + sizeof(A) * numbers(padded(head_size)) + sizeof(Row<A>) * kRows;
  }

  __device__ explicit Shared(int head_size) : width(padded(head_size)) {
    unsigned char* memory = dynamic_shared<unsigned char>();
    keys = reinterpret_cast<T*>(memory);
    queries = reinterpret_cast<A*>(memory + key_bytes);
    weights = queries + kRows * width;
    factors = weights + kRows * kTile;
    totals = factors + kRows;
    rows = reinterpret_cast<Row<A>*>(queries + numbers(width));
  }
};

// One block's rows, and its share of their keys.
struct Part {
  int64_t sample;
  Sequence sequence;
  int key_head, rows, split;
  int64_t first_row;  // of the key head's [L, H / G]

  __device__ Part(const Forward& p, int64_t block, int64_t row_blocks)
      : sample(block / p.splits / row_blocks / p.call.key_heads),
        sequence(p.call, sample),
        key_head(static_cast<int>(block / p.splits / row_blocks % p.call.key_heads)),
        split(static_cast<int>(block % p.splits)),
        first_row(block / p.splits % row_blocks * kRows) {
    const int64_t left =
        static_cast<int64_t>(sequence.queries) * (p.call.heads / p.call.key_heads) - first_row;
    rows = static_cast<int>(left < kRows ? left : kRows);
  }
};

// The columns of a tile: those of [begin, end) exist, and the tile starts at `first`, a multiple of 4.
struct Tile {
  int first, begin, end;
};

// The key head's rows of `size` of an operand, or those of the extra columns, of which the first is row S.
template <class T>
__device__ HeadRows<T> rows_of(const Part& part, const Operand& operand, const void* extra, bool is_extra,
                               int count, int size) {
  if (is_extra)
    return HeadRows<T>(extra, static_cast<int64_t>(part.key_head) * count * size, size, part.sequence.keys);
  return HeadRows<T>(operand, part.sequence.batch, part.key_head, part.sequence.first_key);
}

template <class T, class A = Arithmetic<T>>
__device__ void load_rows(const Call& p, const Part& part, const Shared<T>& shared) {
  const int group = p.heads / p.key_heads, t = static_cast<int>(threadIdx.x);
  if (t < part.rows) {
    const int i = static_cast<int>((part.first_row + t) / group);
    const int h = part.key_head * group + static_cast<int>((part.first_row + t) % group);
    const Strides& mask = p.mask_strides;
    shared.rows[t] = {part.sequence.batch * mask.batch + h * mask.head + i * mask.row,
                      Window(p, i, part.sequence.keys), p.alibi_slopes ? A(p.alibi_slopes[h]) : A(0), i, h};
  }
  __syncthreads();
  const int size = p.head_size;
  for (int item = t; item < part.rows * shared.width; item += kThreads) {
    const int r = item / shared.width, d = item % shared.width;
    const Row<A>& row = shared.rows[r];
    const Strides& s = p.query.strides;
    const int64_t from = part.sequence.batch * s.batch + row.head * s.head +
                         (part.sequence.first_query + row.query) * s.row + d * s.column;
    shared.queries[item] = d < size ? widen(static_cast<const T*>(p.query.data)[from]) : A(0);
  }
}

// The part's share of the keys that any of its rows keeps.
template <class T>
__device__ Tile share_of(const Part& part, const Shared<T>& shared, int splits) {
  int begin = part.sequence.keys, end = 0;
  for (int r = 0; r < part.rows; ++r) {
    const Window& window = shared.rows[r].window;
    if (window.begin >= window.end) continue;
    begin = min(begin, window.begin);
    end = max(end, window.end);
  }
  begin = begin / 4 * 4;
  const int tiles = end > begin ? (end - begin - 1) / kTile + 1 : 0;
  const int64_t share = static_cast<int64_t>(ceil_div(tiles, splits)) * kTile;
  const int64_t from = begin + part.split * share;
  const int first = static_cast<int>(from < end ? from : end);
  return {first, first, static_cast<int>(from + share < end ? from + share : end)};
}

// The chunk at `c` of the tile's keys, zeros beyond them, comes into shared memory.
template <class T>
__device__ void load_chunk(const Shared<T>& shared, const HeadRows<T>& keys, const Tile& tile, int size,
                           int c) {
  constexpr int V = kPack<T>;
  const int t = static_cast<int>(threadIdx.x);
  if (!keys.packs) {
    for (int item = t; item < kTile * kChunk<T>; item += kThreads) {
      const int j = tile.first + item / kChunk<T>, d = c + item % kChunk<T>;
      shared.keys[item / kChunk<T> * kKeyStride<T> + item % kChunk<T>] =
          j >= tile.begin && j < tile.end && d < size ? keys.data[j * keys.row + d * keys.column]
                                                      : narrow<T>(0);
    }
    return;
  }
  Pack<T, V> packs[kChunkPacks];
#pragma unroll
  for (int u = 0; u < kChunkPacks; ++u) {
    const int j = tile.first + t / kChunkPacks + u * (kThreads / kChunkPacks);
    packs[u] =
        keys.template items<true>(j, c + t % kChunkPacks * V, j >= tile.begin && j < tile.end ? size : 0);
  }
#pragma unroll
  for (int u = 0; u < kChunkPacks; ++u) {
    const int i = t / kChunkPacks + u * (kThreads / kChunkPacks);
    *reinterpret_cast<Pack<T, V>*>(shared.keys + i * kKeyStride<T> + t % kChunkPacks * V) = packs[u];
  }
}

// Scores of the tile, a thread for a key.
template <class T, class A = Arithmetic<T>>
__device__ void score_tile(const Call& p, const Part& part, const Shared<T>& shared, const HeadRows<T>& keys,
                           const Tile& tile) {
  constexpr int V = kPack<T>, N = kPack<A>;
  const int t = static_cast<int>(threadIdx.x), size = p.head_size;
  A sums[kRows] = {};
  for (int c = 0; c < shared.width; c += kChunk<T>) {
    load_chunk(shared, keys, tile, size, c);
    __syncthreads();
    for (int d = 0; d < kChunk<T> && c + d < size; d += V) {
      const Pack<T, V> k = shared_pack<T, V>(shared.keys + t * kKeyStride<T> + d);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= part.rows) break;
        A sum = 0;  // of the pack: a chain of D additions would lose bits
#pragma unroll
        for (int e = 0; e < V; e += N) {
          const Pack<A, N> q = shared_pack<A, N>(shared.queries + r * shared.width + c + d + e);
#pragma unroll
          for (int i = 0; i < N; ++i) sum += q.items[i] * k.get(e + i);
        }
        sums[r] += sum;
      }
    }
    __syncthreads();
  }
  const int j = tile.first + t;
  const bool here = j >= tile.begin && j < tile.end, extra = j >= part.sequence.keys;
  const A term = here && !extra ? key_term<T>(p, part.sequence.batch, j) : A(0);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= part.rows) break;
    const Row<A>& row = shared.rows[r];
    A s = -kInfinity<A>;
    if (here)
      s = extra ? scaled(p, sums[r]) : score_of<T>(p, sums[r], row.window, row.slope, row.mask, j, term);
    shared.weights[r * kTile + t] = s;
  }
}

}  // namespace fusednn::cuda::attention
