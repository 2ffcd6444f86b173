// The kernels of spatial attention of one instruction set, as a table. This file is compiled once for each.
#include "spatial/cpu/params.h"

#include "core/cpu/dtypes.h"
#include "spatial/cpu/backward.h"
#include "spatial/cpu/forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {
namespace {

// f(kernel) with the call's Kernel<T, S, Image> on `workspace`; without one it is there to count bytes.
template <template <class, class, template <class> class> class Kernel, class Call, class F>
void with_kernel(const Call& call, const SpatialForward& p, int threads, Carver& shared, const F& f) {
  with_types(p.dtype, [&]<class T, class S>() {
    with_layout(p.shape,
                [&]<template <class> class Image>() { f(Kernel<T, S, Image>(call, threads, shared)); });
  });
}

size_t forward_workspace(const SpatialForward& p, int threads) {
  Carver count(nullptr);
  with_kernel<SpatialForwardPass>(p, p, threads, count, [](const auto&) {});
  return count.bytes;
}

void forward(const SpatialForward& p, const Parallel& parallel) {
  Carver shared(p.workspace);
  with_kernel<SpatialForwardPass>(p, p, parallel.threads, shared, [&](const auto& k) { k.run(parallel); });
}

size_t backward_workspace(const SpatialBackward& p, int threads) {
  Carver count(nullptr);
  with_kernel<SpatialBackwardPass>(p, p.forward, threads, count, [](const auto&) {});
  return count.bytes;
}

void backward(const SpatialBackward& p, const Parallel& parallel) {
  Carver shared(p.workspace);
  with_kernel<SpatialBackwardPass>(p, p.forward, parallel.threads, shared,
                                   [&](const auto& k) { k.run(parallel); });
}

// A row and its mask per thread; x and y for all.
template <class T>
struct SoftmaxBuffers {
  T *x, *y, *rows;
  int64_t pitch;
  SoftmaxBuffers(const SpatialSoftmax& p, int threads, Carver& shared)
      : pitch(row_pitch(p.height * p.width)) {
    x = shared.take<T>(pitch);
    y = shared.take<T>(pitch);
    rows = shared.take<T>(threads * 3 * pitch);
    if (shared.base) coordinate_rows(p.height, p.width, x, y);
  }
  T* row(int thread, int which) const { return rows + (thread * 3 + which) * pitch; }
};

size_t softmax_workspace(const SpatialSoftmax& p, int threads) {
  Carver count(nullptr);
  with_types(p.dtype, [&]<class T, class S>() { SoftmaxBuffers<T>(p, threads, count); });
  // The temperature's terms, one of each row.
  return count.bytes + p.rows * sizeof(double);
}

void softmax_forward(const SpatialSoftmax& p, const Parallel& parallel) {
  with_types(p.dtype, [&]<class T, class S>() {
    Carver shared(p.workspace);
    const SoftmaxBuffers<T> buffers(p, parallel.threads, shared);
    const int64_t area = p.height * p.width;
    const T t = usable_temperature<T>(p.temperature);
    parallel(p.rows, p.rows * area > kSerialElements, [&](int64_t begin, int64_t end, int thread) {
      T *const s = buffers.row(thread, 0), *const keep = p.mask ? buffers.row(thread, 1) : nullptr;
      for (int64_t r = begin; r < end; ++r) {
        widen_row(static_cast<const S*>(p.logits) + r * area, area, s);
        if (keep) expand_mask(p.mask + r * area, area, keep);
        softmax_row(area, keep, t, s);
        narrow_row(s, area, static_cast<S*>(p.map) + r * area);
        if (!p.coordinates) continue;
        S* const xy = static_cast<S*>(p.coordinates) + 2 * r;
        narrow(dot_rows(area, s, buffers.x), xy);
        narrow(dot_rows(area, s, buffers.y), xy + 1);
      }
    });
  });
}

void softmax_backward(const SpatialSoftmaxBackward& b, const Parallel& parallel) {
  const SpatialSoftmax& p = b.forward;
  with_types(p.dtype, [&]<class T, class S>() {
    Carver shared(p.workspace);
    const SoftmaxBuffers<T> buffers(p, parallel.threads, shared);
    double* const temperatures = shared.take<double>(b.grad_temperature ? p.rows : 0);
    const int64_t area = p.height * p.width;
    const T t = usable_temperature<T>(p.temperature);
    parallel(p.rows, p.rows * area > kSerialElements, [&](int64_t begin, int64_t end, int thread) {
      T *const d = buffers.row(thread, 0), *const a = buffers.row(thread, 1),
               *const keep = p.mask ? buffers.row(thread, 2) : nullptr;
      for (int64_t r = begin; r < end; ++r) {
        widen_row(static_cast<const S*>(p.map) + r * area, area, a);
        if (keep) expand_mask(p.mask + r * area, area, keep);
        widen_row_or_zero(typed<S>(b.grad_map, r * area), area, d);
        if (const S* xy = typed<S>(b.grad_coordinates, 2 * r)) {
          const Vec<T> by_x(static_cast<T>(widen(xy[0]))), by_y(static_cast<T>(widen(xy[1])));
          for_vectors<T>(area, [&](int64_t i, int64_t) {
            const Vec<T> along = Vec<T>::load(buffers.x + i) * by_x + Vec<T>::load(buffers.y + i) * by_y;
            (Vec<T>::load(d + i) + along).store(d + i);
          });
        }
        softmax_backward_row(area, keep, a, t, d, b.grad_temperature ? temperatures + r : nullptr);
        if (b.grad_logits) narrow_row(d, area, static_cast<S*>(b.grad_logits) + r * area);
      }
    });
    if (!b.grad_temperature) return;
    double total = 0;
    for (int64_t r = 0; r < p.rows; ++r) total += temperatures[r];
    *b.grad_temperature = -total / t;
  });
}

}  // namespace

FUSEDNN_KERNELS(SpatialKernels) = {
    forward_workspace, forward,         backward_workspace, backward,
    softmax_workspace, softmax_forward, softmax_backward,
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
