// CPU kernels of spatial attention and of the softmax over positions. No torch here.
//
// N = batch, C = channels, P = H W positions, G = maps of a sample (glimpses), A = rows of an additive
// score's weight. `dtype` is that of every tensor but the mask and the temperature's gradient; scores, maps
// and sums are float, or double for f64. The formulas are those of python/fusednn/spatial/reference.py.
// Without channels there are no features, and the map is the softmax of hidden_term.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/cpu/kernel_table.h"
#include "core/dtype.h"
#include "core/parallel.h"

namespace fusednn::cpu {

enum class SpatialOutput : int { scale, sum, coordinates };

struct SpatialShape {
  int64_t batch, channels, height, width, glimpses;
  int64_t rows;        // of `weight`: G for positional scores, A for additive ones
  bool additive;       // with v
  bool channels_last;  // features, and what has their shape, are [N, P, C]; positional scores only
  SpatialOutput output;
  int64_t area() const { return height * width; }
};

struct SpatialForward {
  DType dtype;
  SpatialShape shape;
  double temperature;       // NaN where it is not positive
  const void* features;     // [N, C, P] or [N, P, C]
  const void* weight;       // [rows, C]
  const void* hidden_term;  // [N, G, P]; additive: [N, A]; or null
  const void* v;            // [G, A] or null
  const bool* mask;         // [N, P], true takes part; or null
  void* attended;           // scale: [N, G C, P] or [N, P, G C]; sum: [N, G C]; coordinates: [N, G, 2]
  void* map;                // [N, G, P]
  void* workspace;          // forward_workspace() bytes
};

struct SpatialBackward {
  SpatialForward forward;     // `attended` and its own `workspace` are not used, `map` is read
  const void* grad_attended;  // as attended, or null
  const void* grad_map;       // [N, G, P] or null
  void* grad_features;        // as features, or null
  void* grad_weight;          // [rows, C] or null
  void* grad_term;            // as hidden_term, or null
  void* grad_v;               // [G, A] or null
  double* grad_temperature;   // one number, or null
  void* workspace;            // backward_workspace() bytes
};

struct SpatialKernels {
  size_t (*forward_workspace)(const SpatialForward&, int threads);
  void (*forward)(const SpatialForward&, const Parallel&);
  size_t (*backward_workspace)(const SpatialBackward&, int threads);
  void (*backward)(const SpatialBackward&, const Parallel&);
};

}  // namespace fusednn::cpu
