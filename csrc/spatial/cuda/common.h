// What the kernels of spatial attention share: a block's part of a sample, tiles of features, sums over lanes.
//
// A block has kThreads threads, [channel lanes, position lanes]; those whose elements are neighbours in memory lie
// side by side. A thread reads tiles of V channels at V positions, V loads of up to 16 bytes, from either memory
// format; all else is the same for both. Lanes are summed in a fixed order.
#pragma once

#include <cstdint>
#include <limits>

#include "core/activations.h"
#include "core/cuda/dtypes.h"
#include "core/cuda/index.h"
#include "core/cuda/launch.h"
#include "core/cuda/reduce.h"
#include "core/cuda/vector_access.h"
#include "spatial/cuda/params.h"

namespace fusednn::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 4;  // that pass over the features at a time, at most
// Blocks of a multiprocessor that ptxas is to aim at: left to choose, it aims at more, and spills.
constexpr int kResident = 1;
template <class T>
constexpr int kPack = sizeof(T) == 8 ? 2 : 4;

// Numbers in shared memory: sums of lanes in every kernel; behind them energies, where scores are additive.
template <class T>
constexpr int kLaneSums = kThreads * (kRows * kPack<T> + 1);
template <class T>
constexpr int kEnergies = kThreads * kRows * kPack<T>;

inline int power_of_two_from(int n, int most) {
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

// Of a block. With channels last, C = 64 takes 16 lanes of channels; else P = 200 takes 64 of positions.
template <class T>
int channel_lanes(const AttentionShape& s) {
  const int channels = power_of_two_from(ceil_div(s.channels, kPack<T>), 32);
  if (s.channels_last) return channels;
  const int least = kThreads / power_of_two_from(ceil_div(s.positions(), kPack<T>), 64);
  return least < channels ? least : channels;
}

template <class A>
constexpr A kNan = std::numeric_limits<A>::quiet_NaN();
template <class A>
constexpr A kSmallestNormal = std::numeric_limits<A>::min();

// T, held to the smallest normal number; NaN unless positive.
template <class A, class Call>
__device__ A temperature_of(const Call& p) {
  const A t =
      p.learned_temperature ? *static_cast<const A*>(p.learned_temperature) : static_cast<A>(p.temperature);
  if (p.learned_temperature && !(t > A(0))) return kNan<A>;
  return t > kSmallestNormal<A> ? t : kSmallestNormal<A>;
}

// exp(below / T) of a score that is `below` the largest; 0 for one that is -inf, at any T.
template <class A>
__device__ A softmax_weight(A below, A t) {
  return below == -kInfinity<A> ? A(0) : math::exp(below / t);
}

// [C, P] of a sample. `packed`: V neighbours are aligned, and there are none or V of them.
template <class T>
struct Plane {
  T* data;
  int64_t c_stride, p_stride;
  bool packed;

  template <class Data>
  __device__ Plane(Data* tensor, int64_t offset, int channels, int positions, bool last, int64_t row)
      : data(static_cast<T*>(const_cast<void*>(static_cast<const void*>(tensor))) + offset),
        c_stride(last ? 1 : positions),
        p_stride(last ? row : 1) {
    constexpr int V = kPack<T>;
    const bool whole = last ? channels % V == 0 && row % V == 0 : positions % V == 0;
    packed = whole && reinterpret_cast<uintptr_t>(data) % (V * sizeof(T)) == 0;
  }

  __device__ bool last() const { return c_stride == 1 && p_stride != 1; }
};

template <class T>
__device__ __forceinline__ void load_pack(const T* from, bool packed, int count,
                                          Arithmetic<T> (&x)[kPack<T>]) {
  load_values<T>(from, 0, packed && count > 0, count, x);
}

// One block's part of one sample.
template <class T>
struct Part {
  using A = Arithmetic<T>;
  static constexpr int V = kPack<T>;
  const AttentionCall& call;
  int channels, positions, channel_lanes, position_lanes;
  int64_t n;
  int split, begin, end;  // positions
  Plane<T> features;
  const bool* mask;  // of the sample

  __device__ Part(const AttentionCall& p, int64_t sample, int split, int channel_lanes)
      : call(p),
        channels(p.shape.channels),
        positions(p.shape.positions()),
        channel_lanes(channel_lanes),
        position_lanes(kThreads / channel_lanes),
        n(sample),
        split(split),
        features(p.features, sample * p.shape.channels * p.shape.positions(), p.shape.channels,
                 p.shape.positions(), p.shape.channels_last, p.shape.channels),
        mask(p.mask ? p.mask + sample * p.shape.positions() : nullptr) {
    const int share = ceil_div(ceil_div(positions, V), p.splits) * V;
    begin = min(split * share, positions);
    end = min(begin + share, positions);
  }

  // That of block `block` of batch x splits.
  __device__ Part(const AttentionCall& p, unsigned block, int channel_lanes)
      : Part(p, block / p.splits, static_cast<int>(block % p.splits), channel_lanes) {}

  // `visit(position)` for the part's positions, by all threads.
  template <class Visit>
  __device__ void each_position(Visit&& visit) const {
    for (int p = begin + static_cast<int>(threadIdx.x); p < end; p += kThreads) visit(p);
  }

  __device__ bool visible(int position) const { return mask == nullptr || mask[position]; }

  // Plane of map g of something like the attended features.
  __device__ Plane<T> attended(const void* tensor, int g) const {
    const AttentionShape& s = call.shape;
    const bool last = s.channels_last && call.output == AttentionOutput::scale;
    const int64_t row = static_cast<int64_t>(s.maps) * channels;
    const int64_t offset = n * row * positions + static_cast<int64_t>(g) * channels * (last ? 1 : positions);
    return Plane<T>(tensor, offset, channels, positions, last, row);
  }

  // f[i][j]: channel c + i at position p + j; 0 beyond both ends.
  __device__ __forceinline__ void load_tile(const Plane<T>& plane, int c, int p, A (&f)[V][V]) const {
    if (plane.last()) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        A x[V];
        load_pack<T>(plane.data + (p + j) * plane.p_stride + c, plane.packed, p + j < end ? channels - c : 0,
                     x);
#pragma unroll
        for (int i = 0; i < V; ++i) f[i][j] = x[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i)
        load_pack<T>(plane.data + (c + i) * plane.c_stride + p, plane.packed, c + i < channels ? end - p : 0,
                     f[i]);
    }
  }

  __device__ __forceinline__ void store_tile(const Plane<T>& plane, int c, int p, const A (&f)[V][V]) const {
    const bool last = plane.last();
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int count = last ? (p + i < end ? channels - c : 0) : (c + i < channels ? end - p : 0);
      T* to = plane.data + (last ? (p + i) * plane.p_stride + c : (c + i) * plane.c_stride + p);
      A x[V];
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] = last ? f[j][i] : f[i][j];
      store_values<T>(to, 0, plane.packed && count > 0, count, x);
    }
  }

  // Masked positions of a tile become 0, whatever they hold.
  __device__ __forceinline__ void hide(int p, A (&f)[V][V]) const {
    if (mask == nullptr) return;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (p + j >= end || mask[p + j]) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) f[i][j] = 0;
    }
  }

  __device__ bool any_visible(int p) const {
    if (mask == nullptr) return true;
    bool any = false;
#pragma unroll
    for (int j = 0; j < V; ++j) any = any || (p + j < end && mask[p + j]);
    return any;
  }
};

// Where a thread stands; `last`: neighbours are channels.
struct Lanes {
  int channel, position;

  template <class T>
  __device__ Lanes(const Part<T>& part, bool last) {
    const int t = static_cast<int>(threadIdx.x);
    channel = last ? t % part.channel_lanes : t / part.position_lanes;
    position = last ? t / part.channel_lanes : t % part.position_lanes;
  }
};

// Adds up `lanes` lanes, of which a thread is `lane`, for each pack `place` of `places`; `adjacent`: those
// lanes are neighbours. `write(row, item, sum)` gets each of the `rows` rows.
template <int Rows, int V, class A, class Write>
__device__ void add_lanes(A (&sums)[Rows][V], int rows, int lane, int lanes, int place, int places,
                          bool adjacent, Write&& write) {
  A* shared = dynamic_shared<A>();
  const int width = adjacent ? min(lanes, 32) : 1;
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    if (r >= rows) break;
#pragma unroll
    for (int j = 0; j < V; ++j)
      for (int step = width / 2; step > 0; step /= 2)
        sums[r][j] += __shfl_xor_sync(0xffffffffu, sums[r][j], step);
  }
  const int items = places * V, stride = Rows * items + 1;  // odd, so that lanes don't share a bank
  if (lane % width == 0) {
#pragma unroll
    for (int r = 0; r < Rows; ++r)
#pragma unroll
      for (int j = 0; j < V; ++j) shared[lane / width * stride + r * items + place * V + j] = sums[r][j];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < rows * items; i += kThreads) {
    A sum = 0;
    for (int l = 0; l < lanes / width; ++l) sum += shared[l * stride + i];
    write(i / items, i % items, sum);
  }
  __syncthreads();
}

// Sums over channels, for each of `rows` rows k and each position p of the part. `add(k, c, p, f, sums)` adds
// the tile f at (c, p) to the sums of positions p ... p + V - 1; `write(k, p, sum)` gets the sums, and
// `after(k, count, p, positions)` is called by all threads when those of the rows from k at p are written.
template <int Rows, class T, class Add, class Write, class After>
__device__ void channel_sums(const Part<T>& part, int rows, Add&& add, Write&& write, After&& after) {
  using A = Arithmetic<T>;
  constexpr int V = kPack<T>;
  const Lanes lane(part, part.call.shape.channels_last);
  const int tile = part.position_lanes * V;
  for (int first = part.begin; first < part.end; first += tile) {
    const int p = first + lane.position * V;
    const int channels = p < part.end && part.any_visible(p) ? part.channels : 0;
    for (int k = 0; k < rows; k += Rows) {
      const int count = min(Rows, rows - k);
      A sums[Rows][V] = {};
      for (int c = lane.channel * V; c < channels; c += part.channel_lanes * V) {
        A f[V][V];
        part.load_tile(part.features, c, p, f);
#pragma unroll
        for (int r = 0; r < Rows; ++r)
          if (r < count) add(k + r, c, p, f, sums[r]);
      }
      add_lanes(sums, count, lane.channel, part.channel_lanes, lane.position, part.position_lanes,
                part.call.shape.channels_last, [&](int r, int item, A sum) {
                  if (first + item < part.end) write(k + r, first + item, sum);
                });
      after(k, count, first, min(tile, part.end - first));
    }
  }
}

// weight[k, c] f[c, p], summed over c.
template <int Rows = kRows, class T, class Write, class After>
__device__ void products(const Part<T>& part, const T* weight, int rows, Write&& write, After&& after) {
  using A = Arithmetic<T>;
  constexpr int V = kPack<T>;
  const bool packed = part.channels % V == 0 && reinterpret_cast<uintptr_t>(weight) % (V * sizeof(T)) == 0;
  channel_sums<Rows>(
      part, rows,
      [&](int k, int c, int, const A(&f)[V][V], A(&sums)[V]) {
        A w[V];
        load_pack<T>(weight + static_cast<int64_t>(k) * part.channels + c, packed, part.channels - c, w);
#pragma unroll
        for (int i = 0; i < V; ++i)
#pragma unroll
          for (int j = 0; j < V; ++j) sums[j] += w[i] * f[i][j];
      },
      write, after);
}

// x[k, p] f[c, p], summed over the part's positions p; x [rows, ...] of `stride`. `write(k, c, sum)`.
template <class T, class Write>
__device__ void position_sums(const Part<T>& part, const Arithmetic<T>* x, int64_t stride, int rows,
                              Write&& write) {
  using A = Arithmetic<T>;
  constexpr int V = kPack<T>;
  const bool last = part.call.shape.channels_last;
  const Lanes lane(part, last);
  const int tile = part.channel_lanes * V;
  for (int first = 0; first < part.channels; first += tile) {
    const int c = first + lane.channel * V;
    const int end = c < part.channels ? part.end : part.begin;
    for (int k = 0; k < rows; k += kRows) {
      const int count = min(kRows, rows - k);
      A sums[kRows][V] = {};
      for (int p = part.begin + lane.position * V; p < end; p += part.position_lanes * V) {
        if (!part.any_visible(p)) continue;
        A f[V][V];
        part.load_tile(part.features, c, p, f);
        part.hide(p, f);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= count) break;
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const A weight = p + j < part.end ? x[(k + r) * stride + p + j] : A(0);
#pragma unroll
            for (int i = 0; i < V; ++i) sums[r][i] += weight * f[i][j];
          }
        }
      }
      add_lanes(sums, count, lane.position, part.position_lanes, lane.channel, part.channel_lanes, !last,
                [&](int r, int item, A sum) {
                  if (first + item < part.channels) write(k + r, first + item, sum);
                });
    }
  }
}

// `visit(c, p)` for the tiles of the part, neighbours in the order of `last`.
template <class T, class Visit>
__device__ void each_tile(const Part<T>& part, bool last, Visit&& visit) {
  constexpr int V = kPack<T>;
  const Lanes lane(part, last);
  for (int p = part.begin + lane.position * V; p < part.end; p += part.position_lanes * V)
    for (int c = lane.channel * V; c < part.channels; c += part.channel_lanes * V) visit(c, p);
}

// Position i of n: from -1 to 1, rounded once.
template <class A>
__device__ A coordinate(int i, int n) {
  return n > 1 ? static_cast<A>(2 * static_cast<int64_t>(i) - (n - 1)) / static_cast<A>(n - 1) : A(-1);
}

}  // namespace fusednn::cuda
