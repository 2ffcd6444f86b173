// What both passes of the attend-and-recur kernels share: vectors in shared memory times matrices in global
// memory, by one block.
#pragma once

#include <algorithm>

#include "recurrence/cuda/params.h"
#include "spatial/cuda/common.h"

namespace fusednn::cuda {

// More than the other kernels' 256: a step is a chain of small products, and what bounds each is how many
// bytes one multiprocessor has on their way from the second-level cache.
constexpr int kStepThreads = 512, kStepWarps = kStepThreads / 32;

// Numbers of shared memory for sums of groups of threads, at its beginning; vectors come behind.
template <class A>
constexpr int kStepSums = kStepThreads * kPack<A>;

// sum over k < K of what add(k, n, sums) adds to the sums of columns n ... n + V - 1, for N columns. A thread
// takes V columns and every groups-th k; write(n, sum). Begins and ends with all threads in step.
template <int V, class A, class Add, class Write>
__device__ void column_sums(int K, int N, Add&& add, Write&& write) {
  A* shared = dynamic_shared<A>();
  const int packs = ceil_div(N, V), thread = static_cast<int>(threadIdx.x);
  for (int first = 0; first < packs; first += kStepThreads) {
    const int columns = min(packs - first, kStepThreads), groups = kStepThreads / columns;
    const int lane = thread % columns, group = thread / columns;
    if (group < groups) {
      A sums[V] = {};
#pragma unroll 4
      for (int k = group; k < K; k += groups) add(k, (first + lane) * V, sums);
#pragma unroll
      for (int i = 0; i < V; ++i) shared[(group * columns + lane) * V + i] = sums[i];
    }
    __syncthreads();
    const int present = min(columns * V, N - first * V);
    for (int i = thread; i < present; i += kStepThreads) {
      A sum = 0;
      for (int g = 0; g < groups; ++g) sum += shared[g * columns * V + i];
      write(first * V + i, sum);
    }
    __syncthreads();
  }
}

template <class M>
__device__ bool rows_are_packed(const M* matrix, int64_t stride, int N) {
  constexpr int V = kPack<M>;
  return stride % V == 0 && N % V == 0 && reinterpret_cast<uintptr_t>(matrix) % (V * sizeof(M)) == 0;
}

// x[K] times matrix[K, N] whose rows are `stride` apart; x in shared memory.
template <class M, class A, class Write>
__device__ void times_rows(int K, int N, const A* x, const M* matrix, int64_t stride, Write&& write) {
  constexpr int V = kPack<M>;
  const bool packed = rows_are_packed(matrix, stride, N);
  column_sums<V, A>(
      K, N,
      [&](int k, int n, A(&sums)[V]) {
        A m[V];
        load_pack<M>(matrix + k * stride + n, packed, N - n, m);
#pragma unroll
        for (int i = 0; i < V; ++i) sums[i] += x[k] * m[i];
      },
      write);
}

// matrix[N, K] times x[K]: a warp takes a row. The caller brings threads in step before and after.
template <class M, class A, class Write>
__device__ void rows_times(int N, int K, const M* matrix, int64_t stride, const A* x, Write&& write) {
  constexpr int V = kPack<M>;
  const bool packed = rows_are_packed(matrix, stride, K);
  const int lane = threadIdx.x % 32;
  for (int n = threadIdx.x / 32; n < N; n += kStepWarps) {
    A sum = 0;
#pragma unroll 2
    for (int k = lane * V; k < K; k += 32 * V) {
      A m[V];
      load_pack<M>(matrix + n * stride + k, packed, K - k, m);
#pragma unroll
      for (int i = 0; i < V; ++i)
        if (k + i < K) sum += m[i] * x[k + i];
    }
    sum = warp_sum(sum);
    if (lane == 0) write(n, sum);
  }
}

// `visit(i)` for i < n, by all threads.
template <class Visit>
__device__ void each(int n, Visit&& visit) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kStepThreads) visit(i);
}

template <class X>
__device__ Arithmetic<X> element_or_zero(const void* tensor, int64_t i) {
  return tensor ? widen(static_cast<const X*>(tensor)[i]) : Arithmetic<X>(0);
}

// Row `row` of a wide tensor, or null.
template <class A>
__device__ A* wide(void* tensor, int64_t row, int64_t width) {
  return tensor ? static_cast<A*>(tensor) + row * width : nullptr;
}

// What a block keeps of a step, behind the sums in its shared memory; in the backward, gradients.
template <class A>
struct StepVectors {
  A *h, *c;     // [H]
  A* x;         // [J]: of the input's product
  A* r;         // [J + Q]: of the state's product, and its term in the scores
  A* map;       // [P]
  A* attended;  // [C]

  __device__ explicit StepVectors(const AttentionLstm& q) {
    h = dynamic_shared<A>() + kStepSums<A>;
    c = h + q.hidden_size;
    x = c + q.hidden_size;
    r = x + q.gate_rows();
    map = r + q.gate_rows() + q.terms();
    attended = map + q.positions;
  }

  // The state of sequence b from and to wide [B, H]; without a cell `to_c` is null.
  __device__ void load_state(void* from_h, void* from_c, int64_t b, int H) const {
    each(H, [&](int u) {
      h[u] = wide<A>(from_h, b, H)[u];
      if (from_c) c[u] = wide<A>(from_c, b, H)[u];
    });
  }
  __device__ void store_state(void* to_h, void* to_c, int64_t b, int H) const {
    each(H, [&](int u) {
      wide<A>(to_h, b, H)[u] = h[u];
      if (to_c) wide<A>(to_c, b, H)[u] = c[u];
    });
  }
};

// Steps of sequence b.
__device__ inline int length_of(const AttentionLstm& q, int64_t b) {
  return q.lengths ? static_cast<int>(min(static_cast<int64_t>(q.steps), q.lengths[b])) : q.steps;
}

// The frame of step t of sequence b.
template <class T>
__device__ const T* frame_of(const AttentionLstm& q, int64_t b, int t) {
  return static_cast<const T*>(q.features) + (b * q.steps + t) * q.channels * q.positions;
}

}  // namespace fusednn::cuda
