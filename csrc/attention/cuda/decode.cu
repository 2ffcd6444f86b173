// Attention of few queries to many keys: a step of a decoder over its cache, and any other number of queries.
//
//   s = scale q k, softcap, ALiBi, masks      l = sum exp(s - m)      lse = m + log l
//   out = sum exp(s - m) z v / l
//
// A block takes kRows rows that share their keys, of the query heads of one key head at one or more queries,
// and a share of the keys, kTile at a time. Scores: a thread has a key, whose head comes in chunks of 128 bytes
// through shared memory. Weights: a warp has a row and a lane four keys, one draw of dropout. Sums: a thread has
// a pack of a value's columns at each n-th key, straight from memory, and a block adds up its threads' at the
// end. The largest score m, the sum l and the sums are those of an online softmax. Where rows are too few to
// fill the device, `splits` blocks share their keys, and a second kernel combines what each found, in a fixed
// order. Bytes moved: s S (D + V) for each kRows rows, s = item size; split, 8 splits (V + 2) a row more.
// Limits: D, V <= 256; with many queries, keys are read from the caches L H / (G kRows) times.
#include <algorithm>

#include "attention/cuda/decode_tile.h"

namespace fusednn::cuda::attention {
namespace {

// A lane's part of a row's online softmax.
template <class A>
struct Online {
  A largest = -kInfinity<A>, sum = 0;
};

// Scores of a row become weights exp(s - m) z, by one warp.
template <class T, class A = Arithmetic<T>>
__device__ void weigh_row(const Call& p, const Part& part, const Shared<T>& shared, const Tile& tile, int r,
                          Online<A>& online) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  A* weights = shared.weights + r * kTile + lane * 4;
  A x[4];
  read_four(weights, x);
  A largest = online.largest;
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = x[i] > largest ? x[i] : largest;
  largest = warp_max(largest);
  const A shift = largest == -kInfinity<A> ? A(0) : largest;
  const A factor = math::exp(online.largest - shift);
  const Dropout<A> dropout(p, part.sample, shared.rows[r].head, shared.rows[r].query, tile.first / 4 + lane);
  A sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const A weight = math::exp(x[i] - shift);
    sum += weight;
    x[i] = dropout.z[i] == A(0) ? A(0) : weight * dropout.z[i];
  }
  write_four(weights, x);
  online.largest = largest;
  online.sum = online.sum * factor + sum;
  if (lane == 0) shared.factors[r] = factor;
}

// What a thread sums: the pack of columns at `column` of keys begin + slice, begin + slice + slices, ...
template <class T>
struct Columns {
  int packs, slices, slice, column;

  __device__ explicit Columns(int value_size) {
    const int t = static_cast<int>(threadIdx.x);
    packs = max(ceil_div(value_size, kPack<T>), 1);
    slices = kThreads / packs;
    slice = t / packs;
    column = t % packs * kPack<T>;
  }
  __device__ bool idle() const { return slice >= slices; }
  __device__ int padded() const { return packs * kPack<T>; }
};

// Adds the tile's weighed values. A weight of 0 hides the value, NaN or not.
template <bool Packs, class T, class A = Arithmetic<T>>
__device__ void add_values(const Part& part, const Shared<T>& shared, const HeadRows<T>& values, int size,
                           const Tile& tile, const Columns<T>& columns, A (&sums)[kRows][kPack<T>]) {
  constexpr int V = kPack<T>, kLoads = Packs ? 4 : 1;
  if (columns.idle()) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= part.rows) break;
    const A factor = shared.factors[r];
#pragma unroll
    for (int e = 0; e < V; ++e) sums[r][e] *= factor;
  }
  for (int first = tile.begin + columns.slice; first < tile.end; first += columns.slices * kLoads) {
    Pack<T, V> v[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int j = first + u * columns.slices;
      v[u] = values.template items<Packs>(j, columns.column, j < tile.end ? size : 0);
    }
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int j = first + u * columns.slices;
      if (j >= tile.end) break;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= part.rows) break;
        const A weight = shared.weights[r * kTile + j - tile.first];
        if (weight == A(0)) continue;
#pragma unroll
        for (int e = 0; e < V; ++e) sums[r][e] += weight * v[u].get(e);
      }
    }
  }
}

// Sums of all slices: `write(r, column, sum)`.
template <class T, class Write, class A = Arithmetic<T>>
__device__ void add_slices(const Part& part, const Shared<T>& shared, int size, const Columns<T>& columns,
                           const A (&sums)[kRows][kPack<T>], Write&& write) {
  A* all = reinterpret_cast<A*>(shared.keys);  // [kRowsAdded, slices, columns]
#pragma unroll
  for (int first = 0; first < kRows; first += kRowsAdded) {
    if (first >= part.rows) break;
    __syncthreads();
    if (!columns.idle()) {
#pragma unroll
      for (int r = 0; r < kRowsAdded; ++r)
#pragma unroll
        for (int e = 0; e < kPack<T>; ++e)
          all[(r * columns.slices + columns.slice) * columns.padded() + columns.column + e] =
              sums[first + r][e];
    }
    __syncthreads();
    const int rows = min(kRowsAdded, part.rows - first);
    for (int item = static_cast<int>(threadIdx.x); item < rows * size; item += kThreads) {
      const int r = item / size, column = item % size;
      A sum = 0;
      for (int slice = 0; slice < columns.slices; ++slice)
        sum += all[(r * columns.slices + slice) * columns.padded() + column];
      write(first + r, column, sum);
    }
  }
}

// What a row's largest score and sum of weights are to the caller; `place` in [B, H, L].
template <class A>
__device__ void store_softmax(const Forward& p, int64_t place, A largest, A sum) {
  static_cast<A*>(p.lse)[place] = sum == A(0) ? -kInfinity<A> : largest + math::log(sum);
  if (p.softmax == nullptr) return;
  A* softmax = static_cast<A*>(p.softmax) + place * 2;
  softmax[0] = largest, softmax[1] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    attention_decode_kernel(Forward p, int64_t row_blocks) {
  using A = Arithmetic<T>;
  const Call& call = p.call;
  const Part part(p, blockIdx.x, row_blocks);
  if (part.rows <= 0) return;
  const Shared<T> shared(call.head_size);
  const Sequence& sequence = part.sequence;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  load_rows(call, part, shared);
  const Tile share = share_of(part, shared, p.splits);

  const int tiles = ceil_div(share.end - share.begin, kTile);
  const int more = call.extra > 0 && part.split == p.splits - 1 ? 1 : 0;  // the extra columns' own tile
  const Columns<T> columns(call.value_size);
  Online<A> online[kRows / kWarps];
  A sums[kRows][kPack<T>] = {};
  for (int n = 0; n < tiles + more; ++n) {
    const bool extra = n == tiles;
    Tile tile{share.begin + n * kTile, share.begin + n * kTile,
              min(share.begin + (n + 1) * kTile, share.end)};
    if (extra) tile = {sequence.keys / 4 * 4, sequence.keys, sequence.keys + call.extra};
    score_tile(call, part, shared,
               rows_of<T>(part, call.key, call.extra_key, extra, call.extra, call.head_size), tile);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kRows / kWarps; ++k) {
      if (warp + k * kWarps < part.rows) weigh_row(call, part, shared, tile, warp + k * kWarps, online[k]);
    }
    __syncthreads();
    const int size = call.value_size;
    const HeadRows<T> values = rows_of<T>(part, call.value, call.extra_value, extra, call.extra, size);
    if (values.packs) {
      add_values<true>(part, shared, values, size, tile, columns, sums);
    } else {
      add_values<false>(part, shared, values, size, tile, columns, sums);
    }
  }

#pragma unroll
  for (int k = 0; k < kRows / kWarps; ++k) {
    const A sum = warp_sum(online[k].sum);
    if (lane == 0) {
      shared.totals[(warp + k * kWarps) * 2] = online[k].largest;
      shared.totals[(warp + k * kWarps) * 2 + 1] = sum;
    }
  }
  __syncthreads();
  const auto output_row = [&](int r) {
    const int64_t query = sequence.batch * call.total_queries + sequence.first_query + shared.rows[r].query;
    return query * call.heads + shared.rows[r].head;
  };
  const int64_t split_offset =
      part.split * (call.cu_seqlens_q ? 1 : call.batch) * call.total_queries * call.heads;
  add_slices(part, shared, call.value_size, columns, sums, [&](int r, int column, A sum) {
    const A total = shared.totals[r * 2 + 1];
    if (p.splits > 1) {
      static_cast<A*>(p.sums)[(split_offset + output_row(r)) * call.value_size + column] = sum;
    } else {
      static_cast<T*>(p.output)[output_row(r) * call.value_size + column] =
          narrow<T>(total == A(0) ? A(0) : sum / total);
    }
  });
  const int r = static_cast<int>(threadIdx.x);
  if (r >= part.rows) return;
  const A largest = shared.totals[r * 2], total = shared.totals[r * 2 + 1];
  if (p.splits > 1) {
    A* stats = static_cast<A*>(p.stats) + (split_offset + output_row(r)) * 2;
    stats[0] = largest, stats[1] = total;
  } else {
    const int64_t head = sequence.batch * call.heads + shared.rows[r].head;
    store_softmax(p, head * call.total_queries + sequence.first_query + shared.rows[r].query, largest, total);
  }
}

// A block takes a row, a warp every n-th split, a lane every 32nd column.
template <class T>
__global__ void __launch_bounds__(kThreads) attention_decode_combine_kernel(Forward p, int64_t rows) {
  using A = Arithmetic<T>;
  constexpr int kColumns = kMostHeadSize / 32;
  const int64_t row = blockIdx.x;
  const int V = p.call.value_size;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const A* stats = static_cast<const A*>(p.stats) + row * 2;
  A largest = -kInfinity<A>;
  for (int s = 0; s < p.splits; ++s) {
    const A m = stats[s * rows * 2];
    if (m > largest) largest = m;
  }
  const A shift = largest == -kInfinity<A> ? A(0) : largest;
  A sums[kColumns] = {}, total = 0;
  for (int s = warp; s < p.splits; s += kWarps) {
    const A factor = math::exp(stats[s * rows * 2] - shift);
    total += stats[s * rows * 2 + 1] * factor;
    const A* from = static_cast<const A*>(p.sums) + (s * rows + row) * V;
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (lane + i * 32 < V) sums[i] += from[lane + i * 32] * factor;
  }
  A* all = dynamic_shared<A>();  // [kWarps, V + 1]
#pragma unroll
  for (int i = 0; i < kColumns; ++i)
    if (lane + i * 32 < V) all[warp * (V + 1) + lane + i * 32] = sums[i];
  if (lane == 0) all[warp * (V + 1) + V] = total;
  __syncthreads();
  total = 0;
  for (int w = 0; w < kWarps; ++w) total += all[w * (V + 1) + V];
  for (int column = static_cast<int>(threadIdx.x); column < V; column += kThreads) {
    A sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += all[w * (V + 1) + column];
    static_cast<T*>(p.output)[row * V + column] = narrow<T>(total == A(0) ? A(0) : sum / total);
  }
  if (threadIdx.x != 0) return;
  const int64_t query = row / p.call.heads, head = row % p.call.heads, L = p.call.total_queries;
  store_softmax(p, (query / L * p.call.heads + head) * L + query % L, largest, total);
}

int64_t row_blocks_of(const Call& p) { return ceil_div(p.queries * (p.heads / p.key_heads), kRows); }

template <class T>
cudaError_t run(const Forward& p, cudaStream_t stream) {
  using A = Arithmetic<T>;
  const Call& call = p.call;
  if (call.heads == 0 || call.batch == 0) return cudaSuccess;
  const int64_t row_blocks = row_blocks_of(call),
                blocks = call.batch * call.key_heads * row_blocks * p.splits;
  const int64_t rows = (call.cu_seqlens_q ? 1 : call.batch) * call.total_queries * call.heads;
  if (!grid_fits(blocks) || (p.splits > 1 && !grid_fits(rows))) return cudaErrorInvalidValue;
  const cudaError_t error = launch(attention_decode_kernel<T>, dim3(static_cast<unsigned>(blocks)),
                                   dim3(kThreads), Shared<T>::bytes(call.head_size), stream, p, row_blocks);
  if (error != cudaSuccess || p.splits == 1) return error;
  return launch(attention_decode_combine_kernel<T>, dim3(static_cast<unsigned>(rows)), dim3(kThreads),
                sizeof(A) * kWarps * (call.value_size + 1), stream, p, rows);
}

}  // namespace

// As many blocks as are resident where there are keys enough: 256 for each block at least, 64 splits at most.
int forward_splits(const Call& p, int multiprocessors) {
  constexpr int64_t kLeastTiles = 2, kMostSplits = 64;
  if (p.heads == 0) return 1;
  const int64_t seen = p.window_left >= 0 && p.window_right >= 0
                           ? std::min(p.keys, p.window_left + p.window_right + kRows)
                           : p.keys;
  const int64_t tiles = ceil_div(seen, kTile), blocks = p.batch * p.key_heads * row_blocks_of(p);
  const int64_t wanted = int64_t{kResident} * multiprocessors / std::max<int64_t>(blocks, 1);
  const int64_t splits =
      std::clamp<int64_t>(wanted, 1, std::clamp<int64_t>(tiles / kLeastTiles, 1, kMostSplits));
  // Shares are whole tiles: no more blocks than get one.
  return static_cast<int>(
      ceil_div(std::max<int64_t>(tiles, 1), ceil_div(std::max<int64_t>(tiles, 1), splits)));
}

cudaError_t forward(const Forward& p, cudaStream_t stream) {
  return visit_dtype(p.call.dtype, [&](auto tag) { return run<typename decltype(tag)::type>(p, stream); });
}

}  // namespace fusednn::cuda::attention
