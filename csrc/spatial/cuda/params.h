// CUDA launchers of the attention over positions: python/fusednn/spatial/reference.py has the formulas.
//
// N = batch, C = channels, P = height width, G = maps, K = rows of the weight: G, or, additive, A. Every
// tensor is dense and on the stream's device; "wide" is float, or double for f64. Features and their gradient
// are [N, C, P], or, channels_last, [N, P, C]. Without channels there are no features, and the map is the softmax
// of hidden_term.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/dtype.h"
#include "core/macros.h"

namespace fusednn::cuda {

// `map`: nothing but the map.
enum class AttentionOutput : int { scale, flatten, sum, coordinates, map };

struct AttentionShape {
  int64_t batch;
  int channels, height, width, maps, rows;
  bool additive, channels_last;

  FUSEDNN_HOST_DEVICE int positions() const { return height * width; }
};

// What forward and backward share.
struct AttentionCall {
  DType dtype;
  AttentionShape shape;
  AttentionOutput output;
  const void* features;
  const void* weight;               // [K, C]
  const void* hidden_term;          // [N, G, P]; additive: [N, A]; or null
  const void* v;                    // [G, A], additive
  const bool* mask;                 // [N, P] or null
  const void* learned_temperature;  // one wide number, or null
  double temperature;               // where none is learned
  int splits;                       // attention_splits: blocks that share a sample's positions
};

struct AttentionForward {
  AttentionCall call;
  void* attended;  // scale: [N, G C, P], as the features; flatten: [N, G, C, P]; sum: [N, G, C]; [N, G, 2]
  void* map;       // [N, G, P]
  // Wide, for more than one split:
  void* weights;  // [N, G, P]
  void* stats;    // [N, splits, G, 2]: the largest score, the sum of the weights
  void* sums;     // sum: [N, splits, G, C]; coordinates: [N, splits, G, 2]
};

// Gradients that are null are not made.
struct AttentionBackward {
  AttentionCall call;
  const void* grad_attended;  // as attended, or null
  const void* grad_map;       // [N, G, P] or null
  const void* map;            // [N, G, P]
  void* grad_features;        // as the features
  void* grad_term;            // as hidden_term
  int blocks;                 // attention_backward_blocks: samples at a time
  // Wide:
  void* d_scores;              // [N, G, P]
  void* d_energy;              // [N, A, P], additive
  void* stats;                 // [N, splits, G, 2]: sum of d_map map, the largest weight
  void* weight_partials;       // [blocks splits, K, C] or null
  void* v_partials;            // [blocks splits, G, A] or null
  void* term_partials;         // [N, splits, A], additive, or null
  void* temperature_partials;  // [blocks splits] or null
};

// sums[o, i] = sum_j partials[o, j, i], in an order that depends on the sizes alone.
struct AddPartials {
  const void* partials;  // [outer, count, inner], wide
  int64_t outer, count, inner;
  DType dtype;  // of the sums
  void* sums;   // [outer, inner]
};

// Both are functions of the shape alone, so that results repeat.
int attention_splits(const AttentionShape&, DType);
int attention_backward_blocks(const AttentionShape&, int splits);

cudaError_t attention_forward(const AttentionForward&, cudaStream_t);
cudaError_t attention_backward(const AttentionBackward&, cudaStream_t);
cudaError_t add_partials(const AddPartials&, cudaStream_t);

}  // namespace fusednn::cuda
