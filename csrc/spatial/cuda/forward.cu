// Attention over positions: scores, softmax and attended features.
//
//   s = w f + term, or v tanh(W f + term)     a = softmax(s / T)     out = f a, or sums of f a or (x, y) a
//
// A block takes a sample: scores while the features come in, kept in shared memory; the softmax; then
// features once more, from the caches, for f a. Where one block would not hold the scores, or blocks would be
// too few, `splits` blocks share a sample: each makes weights exp((s - m) / T) of its own largest score m,
// their sum and the sums that they weigh, and a second kernel brings all to the common m (an online softmax),
// in a fixed order. Bytes moved: s (C P + G P + |out|) a sample, s = item size; split, 8 or 16 G P more, and
// scale and flatten read the features again.
#include <algorithm>

#include "spatial/cuda/common.h"

namespace fusednn::cuda {
namespace {

// What a block holds of the scores, and a block's share where there are fewer samples than multiprocessors.
constexpr int kScoreBytes = 24 * 1024, kWantedBlocks = 256, kLeastPositions = 512;

// Scores of a part, then weights, then its map: element (g, p) at data[g * stride + p].
template <class A>
struct Scores {
  A* data;
  int64_t stride;
  __device__ A& at(int g, int p) const { return data[g * stride + p]; }
};

// Numbers in shared memory before the scores.
template <class T>
__host__ __device__ int scores_offset(const AttentionShape& s) {
  return kLaneSums<T> + (s.additive ? kEnergies<T> : 0);
}

template <class T, class A = Arithmetic<T>>
__device__ void score(const Part<T>& part, const Scores<A>& s) {
  const AttentionCall& call = part.call;
  const AttentionShape& shape = call.shape;
  const T* weight = static_cast<const T*>(call.weight);
  const T* term = static_cast<const T*>(call.hidden_term);
  if (!shape.additive) {
    products(
        part, weight, shape.maps,
        [&](int g, int p, A sum) {
          const int64_t place = (part.n * shape.maps + g) * part.positions + p;
          const bool visible = part.visible(p);
          s.at(g, p) = visible ? sum + (term ? widen(term[place]) : A(0)) : -kInfinity<A>;
        },
        [](int, int, int, int) {});
    return;
  }
  const T* v = static_cast<const T*>(call.v);
  A* energies = dynamic_shared<A>() + kLaneSums<T>;  // [kRows, tile]
  const int tile = part.position_lanes * part.V;
  products(
      part, weight, shape.rows,
      [&](int k, int p, A sum) {
        const A u = term ? widen(term[part.n * shape.rows + k]) : A(0);
        energies[k % kRows * tile + (p - part.begin) % tile] = math::tanh(sum + u);
      },
      [&](int k, int count, int first, int present) {
        for (int i = static_cast<int>(threadIdx.x); i < shape.maps * present; i += kThreads) {
          const int g = i / present, p = i % present;
          A sum = k == 0 ? A(0) : s.at(g, first + p);
          for (int r = 0; r < count; ++r)
            sum += widen(v[static_cast<int64_t>(g) * shape.rows + k + r]) * energies[r * tile + p];
          const bool hidden = k + count == shape.rows && !part.visible(first + p);
          s.at(g, first + p) = hidden ? -kInfinity<A> : sum;
        }
        __syncthreads();
      });
}

template <class A>
struct SoftmaxStats {
  A largest, sum;

  // What every weight exp((s - largest) / T) with another largest is to be multiplied by.
  __device__ A factor(A their_largest, A t) const {
    return softmax_weight(their_largest - (largest == -kInfinity<A> ? A(0) : largest), t);
  }
};

// Scores of map g become weights.
template <class T, class A = Arithmetic<T>>
__device__ SoftmaxStats<A> weigh(const Part<T>& part, const Scores<A>& s, int g, A t) {
  A largest = -kInfinity<A>, sum = 0;
  part.each_position([&](int p) {
    const A x = s.at(g, p);
    largest = x > largest ? x : largest;
  });
  largest = block_max<kWarps>(largest);
  const SoftmaxStats<A> shift{largest, 0};
  part.each_position([&](int p) {
    const A weight = shift.factor(s.at(g, p), t);
    s.at(g, p) = weight;
    sum += weight;
  });
  return {largest, block_sum<kWarps>(sum)};
}

// Weights of map g become the map, which is stored.
template <class T, class A = Arithmetic<T>>
__device__ void normalise(const Part<T>& part, const Scores<A>& s, int g, A factor, A sum, void* map) {
  T* to = static_cast<T*>(map) + (part.n * part.call.shape.maps + g) * part.positions;
  part.each_position([&](int p) {
    const A a = part.visible(p) ? s.at(g, p) * factor / (sum == A(0) ? A(1) : sum) : A(0);
    s.at(g, p) = a;
    to[p] = narrow<T>(a);
  });
}

template <class T, class A = Arithmetic<T>>
__device__ void store_scaled(const Part<T>& part, const Scores<A>& s, void* attended) {
  constexpr int V = kPack<T>;
  each_tile(part, part.call.shape.channels_last && part.call.output == AttentionOutput::scale,
            [&](int c, int p) {
              A f[V][V], out[V][V];
              part.load_tile(part.features, c, p, f);
              part.hide(p, f);
              for (int g = 0; g < part.call.shape.maps; ++g) {
#pragma unroll
                for (int j = 0; j < V; ++j) {
                  const A a = p + j < part.end ? s.at(g, p + j) : A(0);
#pragma unroll
                  for (int i = 0; i < V; ++i) out[i][j] = f[i][j] * a;
                }
                part.store_tile(part.attended(attended, g), c, p, out);
              }
            });
}

// Sums of what the part's weights weigh; `write(g, item, sum)`, items being channels or x and y.
template <class T, class Write, class A = Arithmetic<T>>
__device__ void weighed_sums(const Part<T>& part, const Scores<A>& s, Write&& write) {
  const AttentionShape& shape = part.call.shape;
  if (part.call.output == AttentionOutput::sum) {
    position_sums(part, s.data, s.stride, shape.maps, write);
    return;
  }
  for (int g = 0; g < shape.maps; ++g) {
    A x = 0, y = 0;
    part.each_position([&](int p) {
      x += s.at(g, p) * coordinate<A>(p % shape.width, shape.width);
      y += s.at(g, p) * coordinate<A>(p / shape.width, shape.height);
    });
    x = block_sum<kWarps>(x);
    y = block_sum<kWarps>(y);
    if (threadIdx.x == 0) write(g, 0, x), write(g, 1, y);
  }
}

__host__ __device__ bool makes_sums(AttentionOutput output) {
  return output == AttentionOutput::sum || output == AttentionOutput::coordinates;
}

__host__ __device__ int64_t sums_of_a_map(const AttentionCall& p) {
  return p.output == AttentionOutput::sum ? p.shape.channels : 2;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    spatial_forward_kernel(AttentionForward p, int channel_lanes) {
  using A = Arithmetic<T>;
  const AttentionShape& shape = p.call.shape;
  const int splits = p.call.splits;
  const Part<T> part(p.call, blockIdx.x, channel_lanes);
  const int64_t items = sums_of_a_map(p.call), places = (part.n * splits + part.split) * shape.maps;
  const A t = temperature_of<A>(p.call);
  const Scores<A> s =
      splits > 1
          ? Scores<A>{static_cast<A*>(p.weights) + part.n * shape.maps * part.positions, part.positions}
          : Scores<A>{dynamic_shared<A>() + scores_offset<T>(shape), part.positions};
  score(part, s);  // ends with all threads in step
  for (int g = 0; g < shape.maps; ++g) {
    const SoftmaxStats<A> found = weigh(part, s, g, t);
    if (splits == 1) {
      normalise(part, s, g, A(1), found.sum, p.map);
    } else if (threadIdx.x == 0) {
      A* stats = static_cast<A*>(p.stats) + (places + g) * 2;
      stats[0] = found.largest, stats[1] = found.sum;
    }
  }
  __syncthreads();
  if (makes_sums(p.call.output)) {
    weighed_sums(part, s, [&](int g, int item, A sum) {
      const int64_t to = (places + g) * items + item;
      if (splits == 1) {
        static_cast<T*>(p.attended)[to] = narrow<T>(sum);
      } else {
        static_cast<A*>(p.sums)[to] = sum;
      }
    });
  } else if (splits == 1 && p.call.output != AttentionOutput::map) {
    store_scaled(part, s, p.attended);
  }
}

// The largest score of map g of the sample, and the sum of all its weights.
template <class T, class A = Arithmetic<T>>
__device__ SoftmaxStats<A> combined(const AttentionForward& p, int64_t n, int g, A t) {
  const A* stats = static_cast<const A*>(p.stats) + (n * p.call.splits * p.call.shape.maps + g) * 2;
  const int64_t stride = 2 * static_cast<int64_t>(p.call.shape.maps);
  SoftmaxStats<A> all{-kInfinity<A>, 0};
  for (int j = 0; j < p.call.splits; ++j)
    all.largest = stats[j * stride] > all.largest ? stats[j * stride] : all.largest;
  for (int j = 0; j < p.call.splits; ++j) all.sum += stats[j * stride + 1] * all.factor(stats[j * stride], t);
  return all;
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    spatial_combine_kernel(AttentionForward p, int channel_lanes) {
  using A = Arithmetic<T>;
  const AttentionShape& shape = p.call.shape;
  const int splits = p.call.splits;
  const Part<T> part(p.call, blockIdx.x, channel_lanes);
  const A* stats = static_cast<const A*>(p.stats) + part.n * splits * shape.maps * 2;
  const A t = temperature_of<A>(p.call);
  const Scores<A> s{static_cast<A*>(p.weights) + part.n * shape.maps * part.positions, part.positions};
  for (int g = 0; g < shape.maps; ++g) {
    const SoftmaxStats<A> all = combined<T>(p, part.n, g, t);
    const A factor = all.factor(stats[(static_cast<int64_t>(part.split) * shape.maps + g) * 2], t);
    normalise(part, s, g, factor, all.sum, p.map);
  }
  __syncthreads();
  if (!makes_sums(p.call.output)) {
    if (p.call.output != AttentionOutput::map) store_scaled(part, s, p.attended);
    return;
  }
  if (part.split != 0) return;
  const int64_t items = sums_of_a_map(p.call), all_items = shape.maps * items;
  const A* sums = static_cast<const A*>(p.sums) + part.n * splits * all_items;
  for (int64_t i = threadIdx.x; i < all_items; i += kThreads) {
    const int g = static_cast<int>(i / items);
    const SoftmaxStats<A> all = combined<T>(p, part.n, g, t);
    A sum = 0;
    for (int j = 0; j < splits; ++j)
      sum += sums[j * all_items + i] * all.factor(stats[(static_cast<int64_t>(j) * shape.maps + g) * 2], t);
    static_cast<T*>(p.attended)[part.n * all_items + i] = narrow<T>(sum / (all.sum == A(0) ? A(1) : all.sum));
  }
}

template <class T>
cudaError_t forward(const AttentionForward& p, cudaStream_t stream) {
  using A = Arithmetic<T>;
  const AttentionShape& s = p.call.shape;
  const int64_t blocks = s.batch * p.call.splits, scores = static_cast<int64_t>(s.maps) * s.positions();
  if (!grid_fits(blocks)) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks));
  const int lanes = channel_lanes<T>(s);
  const size_t shared = sizeof(A) * (scores_offset<T>(s) + (p.call.splits == 1 ? scores : 0));
  const cudaError_t error = launch(spatial_forward_kernel<T>, grid, dim3(kThreads), shared, stream, p, lanes);
  if (error != cudaSuccess || p.call.splits == 1) return error;
  return launch(spatial_combine_kernel<T>, grid, dim3(kThreads), 0, stream, p, lanes);
}

}  // namespace

int attention_splits(const AttentionShape& s, DType dtype) {
  const int64_t item = dtype == DType::f64 ? 8 : 4, positions = s.positions();
  const int64_t to_fit = ceil_div(s.maps * positions * item, kScoreBytes);
  const int64_t to_fill =
      std::min(kWantedBlocks / std::max<int64_t>(s.batch, 1), positions / kLeastPositions);
  return static_cast<int>(
      std::clamp<int64_t>(std::max(to_fit, to_fill), 1, std::max<int64_t>(positions / 64, 1)));
}

cudaError_t attention_forward(const AttentionForward& p, cudaStream_t stream) {
  return visit_dtype(p.call.dtype,
                     [&](auto tag) { return forward<typename decltype(tag)::type>(p, stream); });
}

}  // namespace fusednn::cuda
