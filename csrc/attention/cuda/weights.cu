// Attention weights from queries, keys and what the forward knows of each row's softmax; what
// nn.MultiheadAttention returns with need_weights, averaged over heads without the [B, H, L, S] it averages.
//
//   weights[i, j] = exp(s[i, j] - m[i]) / l[i] z[i, j], or their mean over heads; s, m, l as in decode.cu
//
// Not exp(s - lse): where all scores of a row are about finfo.min, lse has no room for log l.
//
// A block makes kTile x kTile weights of a sample and loops over its heads: products of queries and keys, a
// chunk of the head at a time through shared memory, on tensor cores for 16 bits, else 4 x 4 of them in a
// thread's registers; then each thread turns its 4 rows of 4 columns (one draw of dropout) into weights and
// adds them up over the heads. Tiles that lie outside of the window are zeros at once.
// Bytes moved: s (L (S + X) for the mean, H times that for each head), and for each tile and head
// 2 s kTile D of queries and keys, mostly from the caches. Flops: 2 B H L S D. Limits: D <= 256; a tile of
// few queries costs as much as a full one.
#include <mma.h>

#include <type_traits>

#include "attention/cuda/common.h"

namespace fusednn::cuda::attention {
namespace {

constexpr int kThreads = 256, kTile = 64, kChunkPacks = 8;
template <class T>
constexpr int kChunk = kChunkPacks * kPack<T>;  // 128 bytes of a head
template <class T>
constexpr bool kTensorCores = sizeof(T) == 2;

// Blocks of a multiprocessor that ptxas is to aim at: left to choose, it aims at more, and spills.
template <class T>
constexpr int kResident = sizeof(T) == 8 ? 1 : 2;

// A thread's 4 rows and 4 neighbouring columns of the tile; a warp's are 16 x 32.
struct Place {
  int warp_row, warp_column, lane;

  __device__ Place() {
    const int t = static_cast<int>(threadIdx.x), warp = t / 32;
    warp_row = warp / 2 * 16, warp_column = warp % 2 * 32, lane = t % 32;
  }
  __device__ int row(int k) const { return warp_row + lane / 8 + k * 4; }
  __device__ int column() const { return warp_column + lane % 8 * 4; }
};

// A thread's own numbers in shared memory, 4 rows of 4: registers for them would cost half of the blocks.
template <class A>
struct Own {
  static constexpr size_t bytes = sizeof(A) * kThreads * 16;
  A* data;
  __device__ A* row(int r) const { return data + (r * kThreads + static_cast<int>(threadIdx.x)) * 4; }
};

// The tile: rows from `row` of `rows`, columns from `column` of the keys and the extra ones after them.
struct Tile {
  int64_t sample;
  int row, column, rows, keys, columns;
};

// Rows of the tile in memory: those from `first` to `end`, of which those from `other` on are of the operand
// `behind`; zeros beyond.
template <class T>
struct Source {
  const HeadRows<T>& rows;
  const HeadRows<T>& behind;
  int first, other, end;
};

// Calls put(i, d, element) or put(i, d, pack) with all of the chunk at `c`.
template <class T, class Put>
__device__ __forceinline__ void load_chunk(const Source<T>& source, int size, int c, Put&& put) {
  const int t = static_cast<int>(threadIdx.x);
  const bool packs = source.rows.packs;
  if (packs) {
#pragma unroll
    for (int item = t; item < kTile * kChunkPacks; item += kThreads) {
      const int i = item / kChunkPacks, d = item % kChunkPacks * kPack<T>, j = source.first + i;
      if (j >= source.other && j < source.end) continue;
      put(i, d, source.rows.template items<true>(j, c + d, j < source.end ? size : 0));
    }
    if (source.other >= source.end) return;
  }
#pragma unroll 1
  for (int item = t; item < kTile * kChunk<T>; item += kThreads) {
    const int i = item / kChunk<T>, d = item % kChunk<T>, j = source.first + i;
    if (packs && (j < source.other || j >= source.end)) continue;
    const HeadRows<T> rows(j < source.other, source.rows, source.behind);
    put(i, d,
        j < source.end && c + d < size ? rows.data[j * rows.row + (c + d) * rows.column] : narrow<T>(0));
  }
}

// Keeps a chunk's rows as rows of `Stride` elements.
template <class T, int Stride>
struct ByRows {
  T* to;
  __device__ void operator()(int i, int d, const Pack<T, kPack<T>>& pack) const {
    *reinterpret_cast<Pack<T, kPack<T>>*>(to + i * Stride + d) = pack;
  }
  __device__ void operator()(int i, int d, T element) const { to[i * Stride + d] = element; }
};

// As columns.
template <class T, int Stride>
struct ByColumns {
  T* to;
  __device__ void operator()(int i, int d, const Pack<T, kPack<T>>& pack) const {
#pragma unroll
    for (int e = 0; e < kPack<T>; ++e) to[(d + e) * Stride + i] = pack.items[e];
  }
  __device__ void operator()(int i, int d, T element) const { to[d * Stride + i] = element; }
};

// Products on tensor cores: two 16 x 16 fragments a warp.
template <class T>
struct MmaProducts {
  static constexpr int stride = kChunk<T> + kPack<T>, stage_stride = 36;
  static constexpr size_t tile_bytes = sizeof(T) * kTile * stride;
  static constexpr size_t bytes = 2 * tile_bytes + sizeof(float) * (kThreads / 32) * 16 * stage_stride;

  const float* stage;  // of the warp

  __device__ MmaProducts(const Source<T>& queries, const Source<T>& keys, int size, const Place& place) {
    namespace wmma = nvcuda::wmma;
    unsigned char* memory = dynamic_shared<unsigned char>();
    T* q = reinterpret_cast<T*>(memory);               // [kTile, stride]
    T* k = reinterpret_cast<T*>(memory + tile_bytes);  // [kTile, stride]
    float* to = reinterpret_cast<float*>(memory + 2 * tile_bytes) +
                static_cast<int>(threadIdx.x) / 32 * 16 * stage_stride;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums[2];
    wmma::fill_fragment(sums[0], 0.0f);
    wmma::fill_fragment(sums[1], 0.0f);
    for (int c = 0; c < size; c += kChunk<T>) {
      load_chunk(queries, size, c, ByRows<T, stride>{q});
      load_chunk(keys, size, c, ByRows<T, stride>{k});
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kChunk<T>; step += 16) {
        wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a;
        wmma::load_matrix_sync(a, q + place.warp_row * stride + step, stride);
#pragma unroll
        for (int f = 0; f < 2; ++f) {
          wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> b;
          wmma::load_matrix_sync(b, k + (place.warp_column + f * 16) * stride + step, stride);
          wmma::mma_sync(sums[f], a, b, sums[f]);
        }
      }
      __syncthreads();
    }
    // What lies where in a fragment is the hardware's affair: the warp's products go through memory.
    __syncwarp();  // heads of size 0 have no barrier above
    for (int f = 0; f < 2; ++f)
      wmma::store_matrix_sync(to + f * 16, sums[f], stage_stride, wmma::mem_row_major);
    __syncwarp();
    stage = to;
  }

  // The thread's row r of 4.
  __device__ void row(const Place& place, int r, float (&x)[4]) const {
    read_four(stage + (place.lane / 8 + r * 4) * stage_stride + place.lane % 8 * 4, x);
  }
};

// Products by multiply-adds, 16 a thread.
template <class T>
struct FmaProducts {
  static constexpr int q_stride = kChunk<T> + kPack<T>, k_stride = kTile + 4;
  static constexpr size_t tile_bytes = sizeof(T) * (kTile * q_stride + kChunk<T> * k_stride);
  static constexpr size_t bytes = tile_bytes + Own<T>::bytes;
  Own<T> made;

  __device__ FmaProducts(const Source<T>& queries, const Source<T>& keys, int size, const Place& place) {
    T* q = dynamic_shared<T>();   // [kTile, q_stride]
    T* k = q + kTile * q_stride;  // [kChunk, k_stride]
    T products[4][4] = {};
    for (int c = 0; c < size; c += kChunk<T>) {
      load_chunk(queries, size, c, ByRows<T, q_stride>{q});
      load_chunk(keys, size, c, ByColumns<T, k_stride>{k});
      __syncthreads();
      // In the forward's order, so that its largest score is found again to the bit.
#pragma unroll 2
      for (int d = 0; d < kChunk<T>; d += kPack<T>) {
        T sums[4][4] = {};
        multiply(q, k, d, place, sums);
#pragma unroll
        for (int i = 0; i < 16; ++i) products[i / 4][i % 4] += sums[i / 4][i % 4];
      }
      __syncthreads();
    }
    made.data = k + kChunk<T> * k_stride;
#pragma unroll
    for (int r = 0; r < 4; ++r) write_four(made.row(r), products[r]);
  }

  // Adds a pack of the heads from `first` on.
  __device__ static void multiply(const T* q, const T* k, int first, const Place& place, T (&sums)[4][4]) {
#pragma unroll
    for (int d = first; d < first + kPack<T>; ++d) {
      T of_keys[4];
      read_four(k + d * k_stride + place.column(), of_keys);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const T of_query = q[place.row(r) * q_stride + d];
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r][i] += of_query * of_keys[i];
      }
    }
  }

  __device__ void row(const Place&, int r, T (&x)[4]) const { read_four(made.row(r), x); }
};

template <class T>
using Products = std::conditional_t<kTensorCores<T>, MmaProducts<T>, FmaProducts<T>>;

// Adds a head's weights to `sums`.
template <class T, class A = Arithmetic<T>>
__device__ void add_head(const Weights& p, const Tile& tile, const Place& place, int head,
                         const A (&terms)[4], const Own<A>& sums) {
  const Call& call = p.call;
  const int key_head = head / (call.heads / call.key_heads);
  const HeadRows<T> queries(call.query, tile.sample, head, 0), keys(call.key, tile.sample, key_head, 0);
  const HeadRows<T> extra(call.extra_key, static_cast<int64_t>(key_head) * call.extra * call.head_size,
                          call.head_size, tile.keys);
  const Products<T> products({queries, queries, tile.row, tile.rows, tile.rows},
                             {keys, extra, tile.column, tile.keys, tile.columns}, call.head_size, place);
  const A slope = call.alibi_slopes ? A(call.alibi_slopes[head]) : A(0);
  const Strides& mask = call.mask_strides;
#pragma unroll 1
  for (int r = 0; r < 4; ++r) {
    const int i = tile.row + place.row(r), first = tile.column + place.column();
    if (i >= tile.rows || first >= tile.columns) continue;
    const A* softmax =
        static_cast<const A*>(p.softmax) + ((tile.sample * call.heads + head) * call.queries + i) * 2;
    const A largest = softmax[0], total = softmax[1];
    if (total == A(0)) continue;
    const Window window(call, i, tile.keys);
    const int64_t row_mask = tile.sample * mask.batch + head * mask.head + i * mask.row;
    const Dropout<A> dropout(call, tile.sample, head, i, first / 4);
    A of_row[4], sum[4];
    products.row(place, r, of_row);
    read_four(sums.row(r), sum);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int j = first + c;
      A s = -kInfinity<A>;
      if (j < tile.keys) {
        s = score_of<T>(call, of_row[c], window, slope, row_mask, j, terms[c]);
      } else if (j < tile.columns) {
        s = scaled(call, of_row[c]);
      }
      if (s != -kInfinity<A> && dropout.z[c] != A(0)) sum[c] += math::exp(s - largest) / total * dropout.z[c];
    }
    write_four(sums.row(r), sum);
  }
}

// Whether any row of the tile keeps any column of it.
__device__ inline bool keeps_any(const Call& p, const Tile& tile) {
  const int last_row = min(tile.row + kTile, tile.rows) - 1, end = min(tile.column + kTile, tile.columns);
  if (end > tile.keys) return true;
  return Window(p, tile.row, tile.keys).begin < end && Window(p, last_row, tile.keys).end > tile.column;
}

template <class T, class A = Arithmetic<T>>
__device__ void store_tile(const Weights& p, const Tile& tile, const Place& place, int64_t matrix, A factor,
                           const Own<A>& sums) {
  constexpr int N = kPack<T> < 4 ? kPack<T> : 4;
  const int first = tile.column + place.column();
  const bool packs = tile.columns % 4 == 0;
#pragma unroll 1
  for (int r = 0; r < 4; ++r) {
    const int i = tile.row + place.row(r);
    if (i >= tile.rows || first >= tile.columns) continue;
    A sum[4];
    read_four(sums.row(r), sum);
    T* to = static_cast<T*>(p.weights) + (matrix * tile.rows + i) * tile.columns + first;
    if (packs) {
#pragma unroll
      for (int c = 0; c < 4; c += N) {
        Pack<T, N> pack;
#pragma unroll
        for (int e = 0; e < N; ++e) pack.set(e, sum[c + e] * factor);
        store(to, c, pack);
      }
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (first + c < tile.columns) to[c] = narrow<T>(sum[c] * factor);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    attention_weights_kernel(Weights p, int row_tiles, int column_tiles) {
  using A = Arithmetic<T>;
  const Call& call = p.call;
  const int64_t block = blockIdx.x, matrix = block / column_tiles / row_tiles;
  const int keys = static_cast<int>(call.keys);
  const Tile tile{p.mean ? matrix : matrix / call.heads,
                  static_cast<int>(block / column_tiles % row_tiles) * kTile,
                  static_cast<int>(block % column_tiles) * kTile,
                  static_cast<int>(call.queries),
                  keys,
                  keys + call.extra};
  const Place place;
  const Own<A> sums{reinterpret_cast<A*>(dynamic_shared<unsigned char>() + Products<T>::bytes)};
  const A zeros[4] = {};
  for (int r = 0; r < 4; ++r) write_four(sums.row(r), zeros);
  if (keeps_any(call, tile)) {
    A terms[4] = {};
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int j = tile.column + place.column() + c;
      if (j < keys) terms[c] = key_term<T>(call, tile.sample, j);
    }
    const int head = p.mean ? 0 : static_cast<int>(matrix % call.heads), end = p.mean ? call.heads : head + 1;
    for (int h = head; h < end; ++h) add_head<T>(p, tile, place, h, terms, sums);
  }
  store_tile<T>(p, tile, place, matrix, p.mean ? A(1) / static_cast<A>(call.heads) : A(1), sums);
}

template <class T>
cudaError_t run(const Weights& p, cudaStream_t stream) {
  const Call& call = p.call;
  const int64_t row_tiles = ceil_div(call.queries, kTile),
                column_tiles = ceil_div(call.keys + call.extra, kTile);
  const int64_t matrices = call.batch * (p.mean ? 1 : call.heads),
                blocks = matrices * row_tiles * column_tiles;
  if (call.heads == 0) return cudaSuccess;
  if (!grid_fits(blocks)) return cudaErrorInvalidValue;
  return launch(attention_weights_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                Products<T>::bytes + Own<Arithmetic<T>>::bytes, stream, p, static_cast<int>(row_tiles),
                static_cast<int>(column_tiles));
}

}  // namespace

cudaError_t weights(const Weights& p, cudaStream_t stream) {
  if (p.call.cu_seqlens_q != nullptr) return cudaErrorInvalidValue;
  return visit_dtype(p.call.dtype, [&](auto tag) { return run<typename decltype(tag)::type>(p, stream); });
}

}  // namespace fusednn::cuda::attention
