// What the kernels of attention share: one row's rules for its scores, loads of packs, dropout.
#pragma once

#include <cstdint>

#include "attention/cuda/params.h"
#include "attention/philox.h"
#include "core/activations.h"
#include "core/cuda/dtypes.h"
#include "core/cuda/index.h"
#include "core/cuda/launch.h"
#include "core/cuda/reduce.h"
#include "core/cuda/vector_access.h"

namespace fusednn::cuda::attention {

template <class T>
constexpr int kPack = kWidestAccess / static_cast<int>(sizeof(T));

// A head's rows of an operand: row j at data + j * row.
template <class T>
struct HeadRows {
  const T* data;
  int64_t row, column;
  bool packs;

  __device__ HeadRows(const Operand& x, int64_t batch, int64_t head, int64_t first)
      : data(static_cast<const T*>(x.data) + batch * x.strides.batch + head * x.strides.head +
             first * x.strides.row),
        row(x.strides.row),
        column(x.strides.column),
        packs(x.packs) {}

  // The first or the second, without a place in memory of which to take the address.
  __device__ HeadRows(bool first, const HeadRows& a, const HeadRows& b)
      : data(first ? a.data : b.data),
        row(first ? a.row : b.row),
        column(first ? a.column : b.column),
        packs(first ? a.packs : b.packs) {}

  // Dense rows of `size`, as if the first were row `first`.
  __device__ HeadRows(const void* dense, int64_t offset, int size, int first)
      : data(static_cast<const T*>(dense) + offset - static_cast<int64_t>(first) * size),
        row(size),
        column(1),
        packs(false) {}

  // V = kPack elements of row j from number `first` on; zeros from number `size` on. Packs needs `packs`.
  template <bool Packs>
  __device__ __forceinline__ Pack<T, kPack<T>> items(int64_t j, int first, int size) const {
    constexpr int V = kPack<T>;
    if (Packs && first < size) return load<T, V>(data, j * row + first);
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      pack.set(i, 0);
      if (!Packs && first + i < size) pack.items[i] = data[j * row + (first + i) * column];
    }
    return pack;
  }
};

// Sequence n of the call, all of whose samples have the same lengths unless they are packed.
struct Sequence {
  int64_t batch, first_query, first_key;  // of the tensors
  int queries, keys;

  __device__ Sequence(const Call& p, int64_t n)
      : batch(n),
        first_query(0),
        first_key(0),
        queries(static_cast<int>(p.queries)),
        keys(static_cast<int>(p.keys)) {
    if (p.cu_seqlens_q == nullptr) return;
    batch = 0;
    first_query = p.cu_seqlens_q[n];
    first_key = p.cu_seqlens_k[n];
    queries = p.cu_seqlens_q[n + 1] - p.cu_seqlens_q[n];
    keys = p.cu_seqlens_k[n + 1] - p.cu_seqlens_k[n];
  }
};

// Which keys row i keeps of its window: [begin, end).
struct Window {
  int64_t position;
  int begin, end;

  __device__ Window(const Call& p, int64_t i, int keys)
      : position(i + p.position_offset), begin(0), end(keys) {
    if (p.window_left >= 0) begin = clamped(position - p.window_left, keys);
    if (p.window_right >= 0) end = clamped(position + p.window_right + 1, keys);
  }

  __device__ static int clamped(int64_t j, int keys) {
    return static_cast<int>(j < 0 ? 0 : (j > keys ? keys : j));
  }
};

// A mask's element as what is added to a score: -inf where it hides.
template <class T>
__device__ __forceinline__ Arithmetic<T> mask_term(const void* mask, bool is_bool, int64_t offset) {
  using A = Arithmetic<T>;
  if (is_bool) return static_cast<const bool*>(mask)[offset] ? A(0) : -kInfinity<A>;
  return widen(static_cast<const T*>(mask)[offset]);
}

template <class T>
__device__ __forceinline__ Arithmetic<T> key_term(const Call& p, int64_t batch, int j) {
  if (p.key_mask == nullptr) return 0;
  return mask_term<T>(p.key_mask, p.key_mask_is_bool, batch * p.key_mask_batch + j * p.key_mask_column);
}

// q k -> scale q k, or softcap tanh(scale q k / softcap).
template <class A>
__device__ __forceinline__ A scaled(const Call& p, A product) {
  const A s = product * static_cast<A>(p.scale), cap = static_cast<A>(p.softcap);
  return cap > A(0) ? cap * math::tanh(s / cap) : s;
}

// The score that key j has in a row, -inf if that doesn't keep it, whatever the product is. `row_mask` is the
// mask's offset of the row, `term` the key mask's.
template <class T, class A = Arithmetic<T>>
__device__ __forceinline__ A score_of(const Call& p, A product, const Window& window, A slope,
                                      int64_t row_mask, int j, A term) {
  if (j < window.begin || j >= window.end || term == -kInfinity<A>) return -kInfinity<A>;
  A s = scaled(p, product);
  if (p.alibi_slopes != nullptr) {
    const int64_t distance = window.position - j;
    s -= slope * static_cast<A>(distance < 0 ? -distance : distance);
  }
  if (p.mask != nullptr) {
    const A added = mask_term<T>(p.mask, p.mask_is_bool, row_mask + j * p.mask_strides.column);
    if (added == -kInfinity<A>) return added;
    s += added;
  }
  return s + term;
}

// What the weights of columns 4 c to 4 c + 3 are multiplied by.
template <class A>
struct Dropout {
  A z[4];

  __device__ Dropout(const Call& p, int64_t batch, int head, int64_t row, int c) {
    if (p.dropout_seed == nullptr) {
      for (A& x : z) x = 1;
      return;
    }
    const math::Philox drawn = math::philox4x32(static_cast<uint64_t>(*p.dropout_seed),
                                                static_cast<uint32_t>(c), static_cast<uint32_t>(row),
                                                static_cast<uint32_t>(head), static_cast<uint32_t>(batch));
#pragma unroll
    for (int i = 0; i < 4; ++i)
      z[i] = drawn.words[i] < p.dropout_threshold ? A(0) : static_cast<A>(p.dropout_scale);
  }
};

// A pack of shared memory. A plain access: the compiler knows which memory it is in.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> shared_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <class A>
__device__ __forceinline__ void read_four(const A* from, A (&x)[4]) {
  constexpr int N = kPack<A>;
#pragma unroll
  for (int i = 0; i < 4; i += N) {
    const Pack<A, N> pack = shared_pack<A, N>(from + i);
#pragma unroll
    for (int j = 0; j < N; ++j) x[i + j] = pack.items[j];
  }
}

template <class A>
__device__ __forceinline__ void write_four(A* to, const A (&x)[4]) {
  constexpr int N = kPack<A>;
#pragma unroll
  for (int i = 0; i < 4; i += N) {
    Pack<A, N> pack;
#pragma unroll
    for (int j = 0; j < N; ++j) pack.items[j] = x[i + j];
    *reinterpret_cast<Pack<A, N>*>(to + i) = pack;
  }
}

}  // namespace fusednn::cuda::attention
