// Gradients of the attention over positions, from the map.
//
//   d a = d out's part + d map      d z = a (d a - sum_p a d a)      d s = d z / T
//   additive: e = tanh(W f + term), made again; d e = (v^T d s) (1 - e e); positional: d e = d s
//   d f = w^T d e + d out's part      d w = sum d e f      d term = d e or sum_p d e      d v = sum d s e
//   d T = -sum d z log(a / max a) / T
//
// A block takes a sample, or, `splits` blocks, a part of it; then d a and its sums have a kernel before. Sums
// over samples are two passes, without atomics: a block adds up those of its samples in partials of its own,
// and add_partials brings the blocks' together in order. Bytes moved of a sample: s (3 C P + 2 |d out|), the
// second reading of features and d out, and the third of features, from the caches; additive, 12 A P more.
#include <algorithm>

#include "spatial/cuda/common.h"

namespace fusednn::cuda {
namespace {

constexpr int64_t kMostPartials = int64_t{1} << 24;  // numbers in all blocks' weight gradients
constexpr int kEnergyRows = 2;                       // at a time, of registers
constexpr int kLeastBlocks = 256, kMostBlocks = 4096;

__device__ float logarithm(float x) { return ::logf(x); }
__device__ double logarithm(double x) { return ::log(x); }

template <class T, class A = Arithmetic<T>>
__device__ A* rows_of(void* tensor, const Part<T>& part, int rows) {
  return static_cast<A*>(tensor) + part.n * rows * part.positions;
}

__device__ bool per_position(AttentionOutput output) {
  return output == AttentionOutput::scale || output == AttentionOutput::flatten;
}

// d a at each position of the part, in d_scores; 0 where masked.
template <class T, class A = Arithmetic<T>>
__device__ void map_gradient(const AttentionBackward& p, const Part<T>& part) {
  constexpr int V = kPack<T>;
  const AttentionShape& shape = p.call.shape;
  const AttentionOutput output = p.call.output;
  const T* grad = static_cast<const T*>(p.grad_attended);
  const T* grad_map = static_cast<const T*>(p.grad_map);
  A* to = rows_of(p.d_scores, part, shape.maps);
  const auto write = [&](int g, int position, A sum) {
    const int64_t place = static_cast<int64_t>(g) * part.positions + position;
    if (grad_map) sum += widen(grad_map[part.n * shape.maps * part.positions + place]);
    to[place] = part.visible(position) ? sum : A(0);
  };
  const bool scaled = grad && per_position(output);
  if (scaled || (grad && output == AttentionOutput::sum)) {
    channel_sums<1>(
        part, shape.maps,
        [&](int g, int c, int position, const A(&f)[V][V], A(&sums)[V]) {
          if (scaled) {
            A d[V][V];
            part.load_tile(part.attended(grad, g), c, position, d);
#pragma unroll
            for (int i = 0; i < V; ++i)
#pragma unroll
              for (int j = 0; j < V; ++j) sums[j] += d[i][j] * f[i][j];
          } else {
            const int64_t first = (part.n * shape.maps + g) * part.channels + c;
#pragma unroll
            for (int i = 0; i < V; ++i) {
              const A d = c + i < part.channels ? widen(grad[first + i]) : A(0);
#pragma unroll
              for (int j = 0; j < V; ++j) sums[j] += d * f[i][j];
            }
          }
        },
        write, [](int, int, int, int) {});
  } else {
    for (int g = 0; g < shape.maps; ++g)
      part.each_position([&](int position) {
        A sum = 0;
        if (grad && output == AttentionOutput::coordinates) {
          const T* xy = grad + (part.n * shape.maps + g) * 2;
          sum = widen(xy[0]) * coordinate<A>(position % shape.width, shape.width) +
                widen(xy[1]) * coordinate<A>(position / shape.width, shape.height);
        }
        write(g, position, sum);
      });
  }
  __syncthreads();
  A* stats = static_cast<A*>(p.stats) + (part.n * p.call.splits + part.split) * shape.maps * 2;
  const T* map = static_cast<const T*>(p.map) + part.n * shape.maps * part.positions;
  for (int g = 0; g < shape.maps; ++g) {
    A sum = 0, largest = 0;
    part.each_position([&](int position) {
      const int64_t place = static_cast<int64_t>(g) * part.positions + position;
      const A a = widen(map[place]);
      sum += to[place] * a;
      largest = a > largest ? a : largest;
    });
    sum = block_sum<kWarps>(sum);
    largest = block_max<kWarps>(largest);
    if (threadIdx.x == 0) stats[g * 2] = sum, stats[g * 2 + 1] = largest;
  }
  __syncthreads();
}

// d a becomes d s; returns this thread's part of sum d z log(a / max a).
template <class T, class A = Arithmetic<T>>
__device__ A score_gradient(const AttentionBackward& p, const Part<T>& part, A t) {
  const AttentionShape& shape = p.call.shape;
  const A* stats = static_cast<const A*>(p.stats) + part.n * p.call.splits * shape.maps * 2;
  const int64_t first = part.n * shape.maps * part.positions;
  const T* map = static_cast<const T*>(p.map) + first;
  T* term = p.grad_term && !shape.additive ? static_cast<T*>(p.grad_term) + first : nullptr;
  A* d = rows_of(p.d_scores, part, shape.maps);
  A logarithms = 0;
  for (int g = 0; g < shape.maps; ++g) {
    A dot = 0, largest = 0;
    for (int j = 0; j < p.call.splits; ++j) {
      const A* of_split = stats + (static_cast<int64_t>(j) * shape.maps + g) * 2;
      dot += of_split[0];
      largest = of_split[1] > largest ? of_split[1] : largest;
    }
    part.each_position([&](int position) {
      const int64_t place = static_cast<int64_t>(g) * part.positions + position;
      const A a = widen(map[place]), d_z = a * (d[place] - dot), d_s = d_z / t;
      d[place] = d_s;
      if (term) term[place] = narrow<T>(d_s);
      if (p.temperature_partials && d_z != A(0)) logarithms += d_z * logarithm(a / largest);
    });
  }
  __syncthreads();
  return logarithms;
}

// Additive: d e in d_energy; sums of d s e and of d e to their partials. A warp takes a row.
template <class T, class A = Arithmetic<T>>
__device__ void energy_gradient(const AttentionBackward& p, const Part<T>& part, int64_t block, bool first) {
  const AttentionShape& shape = p.call.shape;
  const T* term = static_cast<const T*>(p.call.hidden_term);
  const T* v = static_cast<const T*>(p.call.v);
  A* d_e = rows_of(p.d_energy, part, shape.rows);
  const A* d_s = rows_of(p.d_scores, part, shape.maps);
  products<kEnergyRows>(
      part, static_cast<const T*>(p.call.weight), shape.rows,
      [&](int k, int position, A sum) {
        const A u = term ? widen(term[part.n * shape.rows + k]) : A(0);
        d_e[static_cast<int64_t>(k) * part.positions + position] =
            part.visible(position) ? math::tanh(sum + u) : A(0);
      },
      [](int, int, int, int) {});
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int k = threadIdx.x / 32; k < shape.rows; k += kWarps) {
    A* row = d_e + static_cast<int64_t>(k) * part.positions;
    for (int g = 0; g < shape.maps && p.v_partials; ++g) {
      A sum = 0;
      for (int i = part.begin + lane; i < part.end; i += 32)
        sum += d_s[static_cast<int64_t>(g) * part.positions + i] * row[i];
      sum = warp_sum(sum);
      A* to = static_cast<A*>(p.v_partials) + (block * shape.maps + g) * shape.rows + k;
      if (lane == 0) *to = first ? sum : *to + sum;
    }
    A total = 0;
    for (int i = part.begin + lane; i < part.end; i += 32) {
      A sum = 0;
      for (int g = 0; g < shape.maps; ++g)
        sum += widen(v[static_cast<int64_t>(g) * shape.rows + k]) *
               d_s[static_cast<int64_t>(g) * part.positions + i];
      sum *= 1 - row[i] * row[i];
      row[i] = sum;
      total += sum;
    }
    total = warp_sum(total);
    if (lane == 0 && p.term_partials)
      static_cast<A*>(p.term_partials)[(part.n * p.call.splits + part.split) * shape.rows + k] = total;
  }
  __syncthreads();
}

// d e: [rows, P], which is d s where scores are positional.
template <class T, class A = Arithmetic<T>>
__device__ void feature_gradient(const AttentionBackward& p, const Part<T>& part, const A* d_e) {
  constexpr int V = kPack<T>;
  const AttentionShape& shape = p.call.shape;
  const T* weight = static_cast<const T*>(p.call.weight);
  const T* grad = static_cast<const T*>(p.grad_attended);
  const T* map = static_cast<const T*>(p.map) + part.n * shape.maps * part.positions;
  const bool scaled = grad && per_position(p.call.output);
  const bool summed = grad && p.call.output == AttentionOutput::sum;
  const Plane<T> to(p.grad_features, part.n * part.channels * part.positions, part.channels, part.positions,
                    shape.channels_last, part.channels);
  each_tile(part, shape.channels_last, [&](int c, int first) {
    A d[V][V] = {};
    if (part.any_visible(first)) {
      for (int k = 0; k < shape.rows; ++k) {
        A w[V];
        load_pack<T>(weight + static_cast<int64_t>(k) * part.channels + c, false, part.channels - c, w);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A x = first + j < part.end ? d_e[static_cast<int64_t>(k) * part.positions + first + j] : A(0);
#pragma unroll
          for (int i = 0; i < V; ++i) d[i][j] += w[i] * x;
        }
      }
      for (int g = 0; g < shape.maps && (scaled || summed); ++g) {
        A x[V][V] = {};
        if (scaled) {
          part.load_tile(part.attended(grad, g), c, first, x);
        } else {
          const T* of_map = grad + (part.n * shape.maps + g) * part.channels + c;
#pragma unroll
          for (int i = 0; i < V; ++i) x[i][0] = c + i < part.channels ? widen(of_map[i]) : A(0);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A a =
              first + j < part.end ? widen(map[static_cast<int64_t>(g) * part.positions + first + j]) : A(0);
#pragma unroll
          for (int i = 0; i < V; ++i) d[i][j] += (scaled ? x[i][j] : x[i][0]) * a;
        }
      }
      part.hide(first, d);
    }
    part.store_tile(to, c, first, d);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    spatial_map_gradient_kernel(AttentionBackward p, int channel_lanes) {
  map_gradient(p, Part<T>(p.call, blockIdx.x, channel_lanes));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    spatial_backward_kernel(AttentionBackward p, int channel_lanes) {
  using A = Arithmetic<T>;
  const AttentionShape& shape = p.call.shape;
  const int splits = p.call.splits, split = static_cast<int>(blockIdx.x % splits);
  const int64_t block = blockIdx.x;
  const A t = temperature_of<A>(p.call);
  A logarithms = 0;
  for (int64_t n = block / splits; n < shape.batch; n += p.blocks) {
    const bool first = n < p.blocks;
    const Part<T> part(p.call, n, split, channel_lanes);
    if (splits == 1) map_gradient(p, part);
    logarithms += score_gradient(p, part, t);
    if (shape.additive) energy_gradient(p, part, block, first);
    const A* d_e = rows_of(shape.additive ? p.d_energy : p.d_scores, part, shape.rows);
    if (p.grad_features) feature_gradient(p, part, d_e);
    if (p.weight_partials) {
      position_sums(part, d_e, part.positions, shape.rows, [&](int k, int c, A sum) {
        A* to = static_cast<A*>(p.weight_partials) + (block * shape.rows + k) * shape.channels + c;
        *to = first ? sum : *to + sum;
      });
    }
    __syncthreads();
  }
  if (!p.temperature_partials) return;
  logarithms = block_sum<kWarps>(logarithms);
  if (threadIdx.x == 0) static_cast<A*>(p.temperature_partials)[block] = -logarithms / t;
}

constexpr int kSums = 32, kCounts = kThreads / kSums;  // lanes of a block

template <class T>
__global__ void __launch_bounds__(kThreads) spatial_add_partials_kernel(AddPartials p, int64_t groups) {
  using A = Arithmetic<T>;
  A* shared = dynamic_shared<A>();  // [kCounts, kSums]
  const int lane = threadIdx.x % kSums, first = threadIdx.x / kSums;
  const int64_t outer = blockIdx.x / groups, i = blockIdx.x % groups * kSums + lane;
  const A* partials = static_cast<const A*>(p.partials) + outer * p.count * p.inner + i;
  A sum = 0;
  if (i < p.inner)
    for (int64_t j = first; j < p.count; j += kCounts) sum += partials[j * p.inner];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (first != 0 || i >= p.inner) return;
  for (int j = 1; j < kCounts; ++j) sum += shared[j * kSums + lane];
  static_cast<T*>(p.sums)[outer * p.inner + i] = narrow<T>(sum);
}

template <class T>
cudaError_t backward(const AttentionBackward& p, cudaStream_t stream) {
  const AttentionShape& s = p.call.shape;
  const int64_t parts = s.batch * p.call.splits;
  if (!grid_fits(parts)) return cudaErrorInvalidValue;
  const int lanes = channel_lanes<T>(s);
  const size_t shared = sizeof(Arithmetic<T>) * kLaneSums<T>;
  if (p.call.splits > 1) {
    const cudaError_t error = launch(spatial_map_gradient_kernel<T>, dim3(static_cast<unsigned>(parts)),
                                     dim3(kThreads), shared, stream, p, lanes);
    if (error != cudaSuccess) return error;
  }
  return launch(spatial_backward_kernel<T>, dim3(static_cast<unsigned>(p.blocks * p.call.splits)),
                dim3(kThreads), shared, stream, p, lanes);
}

}  // namespace

int attention_backward_blocks(const AttentionShape& s, int splits) {
  const int64_t weights = std::max<int64_t>(static_cast<int64_t>(s.rows) * s.channels, 1) * splits;
  const int64_t blocks = std::clamp<int64_t>(kMostPartials / weights, std::max(kLeastBlocks / splits, 1),
                                             std::max(kMostBlocks / splits, 1));
  return static_cast<int>(std::min(s.batch, blocks));
}

cudaError_t attention_backward(const AttentionBackward& p, cudaStream_t stream) {
  return visit_dtype(p.call.dtype,
                     [&](auto tag) { return backward<typename decltype(tag)::type>(p, stream); });
}

cudaError_t add_partials(const AddPartials& p, cudaStream_t stream) {
  const int64_t groups = ceil_div(p.inner, kSums), blocks = p.outer * groups;
  if (!grid_fits(blocks)) return cudaErrorInvalidValue;
  return visit_dtype(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(spatial_add_partials_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                  kThreads * sizeof(Arithmetic<T>), stream, p, groups);
  });
}

}  // namespace fusednn::cuda
