// Gradients of a depthwise convolution from that of what it feeds.
//
//   input   the convolution of dz, spread by the stride, with the kernels turned by half
//   weight  dW[i, j, c] = sum over n, r, x of dz[r, x, c] in[r s - p + i d, x s - p + j d, c]
//   bias    sum of dz
//
// One pass does both: as rows of dz come into the ring that the input gradient is made of, the input's rows
// are in another, from which z is made again (for the norm or the activation behind it) and with which dz is
// multiplied for the weights. Bytes: the input, the gradient and the input's gradient, once each.
//
// Weight gradients are summed by strip, strips by bands of an image's rows, and bands in order: what a band
// is depends on the shape alone, so the result doesn't depend on the number of threads.
#pragma once

#include "conv/cpu/depthwise_forward.h"

namespace fusednn::cpu::FUSEDNN_ISA {

constexpr int kTapsAtOnce = 8;
constexpr int64_t kBandTasks = 32;  // bands of images are cut until there are so many

inline DepthwiseShape transposed(const DepthwiseShape& s) {
  DepthwiseShape t = s;
  t.multiplier = 1;
  t.height = s.out_height;
  t.width = s.out_width;
  t.out_height = s.height;
  t.out_width = s.width;
  t.stride_h = t.stride_w = 1;
  t.spread_h = s.stride_h;
  t.spread_w = s.stride_w;
  t.pad_top = extent(s.kernel_h, s.dilation_h) - 1 - s.pad_top;
  t.pad_left = extent(s.kernel_w, s.dilation_w) - 1 - s.pad_left;
  return t;
}

// sums[j] += dz * in for `taps` neighbours in a kernel row, over one output row.
template <int taps, class T>
void weight_gradient_row(int64_t width, const T* dz, const T* in, int64_t step, int64_t dilation, T* sums) {
  constexpr int w = Vec<T>::size;
  Vec<T> acc[taps];
#pragma GCC unroll 8
  for (int j = 0; j < taps; ++j) acc[j] = Vec<T>::load(sums + j * w);
  for (int64_t x = 0; x < width; ++x, in += step, dz += w) {
    const Vec<T> g = Vec<T>::load(dz);
#pragma GCC unroll 8
    for (int j = 0; j < taps; ++j) acc[j] = acc[j] + g * Vec<T>::load(in + j * dilation);
  }
#pragma GCC unroll 8
  for (int j = 0; j < taps; ++j) acc[j].store(sums + j * w);
}

// The same for a whole 3 x 3 kernel, and the bias.
template <class T>
void weight_gradient_3x3(int64_t width, const T* dz, const T* const* rows, int64_t step, int64_t dilation,
                         T* sums) {
  constexpr int w = Vec<T>::size;
  Vec<T> acc[9];
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) acc[t] = Vec<T>::load(sums + t * w);
  for (int64_t x = 0; x < width; ++x, dz += w) {
    const Vec<T> g = Vec<T>::load(dz);
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j)
        acc[i * 3 + j] = acc[i * 3 + j] + g * Vec<T>::load(rows[i] + x * step + j * dilation);
  }
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) acc[t].store(sums + t * w);
}

template <class T>
void add_bias_gradient(int64_t pixels, const T* dz, T* sums) {
  constexpr int w = Vec<T>::size;
  Vec<T> acc(T(0));
  for (int64_t i = 0; i < pixels; ++i) acc = acc + Vec<T>::load(dz + i * w);
  (Vec<T>::load(sums) + acc).store(sums);
}

// sums [taps + 1][w] += those of a strip: dz [rows W'][w], the ring's rows of one block.
template <class T>
void weight_gradient_strip(const DepthwiseShape& s, const RowRing<T>& ring, Taps<T>& taps, int64_t block,
                           int64_t r, int64_t rows, const T* dz, T* sums) {
  constexpr int w = Vec<T>::size;
  add_bias_gradient(rows * s.out_width, dz, sums + s.kernel_h * s.kernel_w * w);
  const bool small = s.kernel_h == 3 && s.kernel_w == 3;
  for (int64_t end = r + rows; r < end; ++r, dz += s.out_width * w) {
    taps.collect(s, ring, block, r, sums, small);
    if (small) {
      weight_gradient_3x3(s.out_width, dz, taps.rows, taps.step, taps.dilation, sums);
      continue;
    }
    for (int64_t i = 0; i < taps.count; ++i) {
      T* to = const_cast<T*>(taps.weights[i]);
      const T* in = taps.rows[i];
      for (int64_t j = 0; j < s.kernel_w; j += kTapsAtOnce) {
        with_count<kTapsAtOnce>(minimum(kTapsAtOnce, s.kernel_w - j), [&]<int N>() {
          weight_gradient_row<N>(s.out_width, dz, in + j * taps.dilation, taps.step, taps.dilation,
                                 to + j * w);
        });
      }
    }
  }
}

template <class T>
struct DepthwiseBands {
  DepthwiseShape t;
  int64_t blocks, bands, group, groups, rows, dx_rows, sums;  // sums: elements of a band's for one block

  DepthwiseBands(const DepthwiseShape& s, int threads) : t(transposed(s)), blocks(blocks_of<T>(s.channels)) {
    const int64_t most = maximum(1, s.out_height / (4 * extent(s.kernel_h, s.dilation_h)));
    bands = minimum(most, ceil_div(kBandTasks, s.batch * blocks));
    group = minimum(kGroup, blocks);
    while (group > 1 && imbalance(s.batch * bands * ceil_div(blocks, group), threads) > 1.1) --group;
    groups = ceil_div(blocks, group);
    rows = depthwise_rows_per_strip(s);
    dx_rows = depthwise_rows_per_strip(t);
    sums = (s.kernel_h * s.kernel_w + 1) * Vec<T>::size;
  }
  int64_t tasks() const { return t.batch * groups * bands; }
};

template <class T, class S>
struct DepthwiseBackwardPass {
  static constexpr int w = Vec<T>::size;
  const DepthwiseBackward& p;
  const DepthwiseShape& s;
  DepthwiseBands<T> bands;
  DepthwiseSource<T, S> source;
  T *flipped, *partial;
  Pixels<S> grad, dx;
  ThreadParts threads;

  DepthwiseBackwardPass(const DepthwiseBackward& q, int thread_count, Carver& shared)
      : p(q),
        s(q.shape),
        bands(s, thread_count),
        source(s, q.input, shared),
        flipped(shared.take<T>(bands.blocks * s.kernel_h * s.kernel_w * w)),
        partial(shared.take<T>(s.batch * bands.bands * bands.blocks * bands.sums)),
        grad(q.grad, s.channels, s.out_height * s.out_width),
        dx(q.grad_input, s.channels, s.height * s.width),
        threads(thread_count, shared, [&](Carver& own) { Buffers(*this, own); }) {}

  struct Buffers {
    RowRing<T> in, dz;
    Taps<T> in_taps, dz_taps;
    T *gradient, *z, *sums, *out;
    Buffers(const DepthwiseBackwardPass& pass, Carver& own)
        : in(pass.s, pass.bands.rows, pass.bands.group, own),
          dz(pass.bands.t, pass.bands.dx_rows, pass.bands.group, own),
          in_taps(pass.s, own),
          dz_taps(pass.bands.t, own),
          gradient(own.take<T>(pass.bands.rows * pass.s.out_width * w)),
          z(own.take<T>(pass.bands.rows * pass.s.out_width * w)),
          sums(own.take<T>(pass.bands.sums)),
          out(own.take<T>(pass.bands.group * pass.bands.dx_rows * pass.s.width * w)) {}
  };
  bool needs_z() const { return p.norm || p.activation != Activation::none; }

  // dz of `count` pixels of a block from `first` on; z is there already, where it is needed.
  void load_dz(int64_t n, int64_t first, int64_t count, int64_t block, const T* z, T* out) const {
    const int64_t c = block * w;
    const T* from = out;
    if (p.blocked_grad)
      from = static_cast<const T*>(p.blocked_grad) + ((n * bands.blocks + block) * grad.area + first) * w;
    else
      load_block(grad, n, first, count, c, out);
    if (p.norm) {
      const NormGradient<T> gradient(p.norm, s.channels, c);
      for (int64_t i = 0; i < count * w; i += w)
        gradient(Vec<T>::load(from + i), Vec<T>::load(z + i)).store(out + i);
    } else if (p.activation != Activation::none) {
      with_activation(p.activation, [&]<Activation A>() {
        for (int64_t i = 0; i < count * w; i += w)
          chain<A>(Vec<T>::load(z + i), Vec<T>::load(from + i)).store(out + i);
      });
    } else if (from != out) {
      std::memcpy(out, from, count * w * sizeof(T));
    }
  }

  // Rows [first, last) of dz: into the ring if `keep`, those in [own_first, own_last) to the weights' sums.
  void visit(Buffers& b, int64_t n, int64_t first_block, int64_t blocks, int64_t first, int64_t last,
             bool keep, int64_t own_first, int64_t own_last, T* sums) const {
    for (int64_t r = first; r < last; r += bands.rows) {
      const int64_t rows = minimum(bands.rows, last - r), count = rows * s.out_width;
      const int64_t own = maximum(r, own_first), own_rows = minimum(r + rows, own_last) - own;
      const bool sum_up = p.grad_weight && own_rows > 0;
      if (needs_z() || sum_up) source.bring_in(b.in, n, first_block, blocks, r, rows);
      for (int64_t i = 0; i < blocks; ++i) {
        if (needs_z()) {
          if (p.norm)
            source.make_stored(b.in, b.in_taps, i, first_block + i, r, rows, b.z);
          else
            source.make(b.in, b.in_taps, i, first_block + i, r, rows, b.z);
        }
        load_dz(n, r * s.out_width, count, first_block + i, b.z, b.gradient);
        if (sum_up) {
          std::memset(b.sums, 0, bands.sums * sizeof(T));
          weight_gradient_strip(s, b.in, b.in_taps, i, own, own_rows,
                                b.gradient + (own - r) * s.out_width * w, b.sums);
          T* to = sums + i * bands.sums;
          for (int64_t t = 0; t < bands.sums; t += w)
            (Vec<T>::load(to + t) + Vec<T>::load(b.sums + t)).store(to + t);
        }
        if (keep) to_ring(b.dz, i, r, rows, b.gradient);
      }
    }
  }

  void to_ring(const RowRing<T>& ring, int64_t block, int64_t first, int64_t rows, const T* dz) const {
    const int64_t x0 = ring.begin_x(), x1 = ring.end_x();
    for (int64_t r = first; r < first + rows; ++r, dz += s.out_width * w) {
      T* row = ring.row(r, block);
      for (int64_t x = x0; x < x1; ++x) Vec<T>::load(dz + x * w).store(row + ring.offset(x));
    }
  }

  void write_dx(const T* block, int64_t n, int64_t first_block, int64_t blocks, int64_t row,
                int64_t rows) const {
    const int64_t first = row * s.width, count = rows * s.width, c = first_block * w;
    if (dx.channels_last && c + blocks * w <= s.channels) {
      for (int64_t i = 0; i < count; ++i) {
        S* to = dx.at(n, first + i, c);
        for (int64_t b = 0; b < blocks; ++b) Vec<T>::load(block + (b * count + i) * w).store(to + b * w);
      }
      return;
    }
    const Pixels<S> none({nullptr, false}, 0, 0);
    for (int64_t b = 0; b < blocks; ++b)
      write_block<1>(block + b * count * w, dx, none, n, first, count, c + b * w,
                     [](Vec<T> x, int, int64_t) __attribute__((always_inline)) { return x; });
  }

  void run_task(Buffers& b, int64_t task) const {
    const int64_t band = task % bands.bands, group = task / bands.bands % bands.groups,
                  n = task / bands.bands / bands.groups;
    const int64_t first_block = group * bands.group,
                  blocks = minimum(bands.group, bands.blocks - first_block);
    const int64_t own_first = s.out_height * band / bands.bands,
                  own_last = s.out_height * (band + 1) / bands.bands;
    const int64_t last_row = s.height * (band + 1) / bands.bands;
    T* sums = partial + ((n * bands.bands + band) * bands.blocks + first_block) * bands.sums;
    std::memset(sums, 0, blocks * bands.sums * sizeof(T));
    b.in.image = b.dz.image = -1;
    int64_t next = own_first;  // rows of the band below it were visited
    const auto go = [&](int64_t first, int64_t last, bool keep) {
      visit(b, n, first_block, blocks, first, last, keep, own_first, own_last, sums);
    };
    for (int64_t y = s.height * band / bands.bands; dx.data && y < last_row; y += bands.dx_rows) {
      const int64_t rows = minimum(bands.dx_rows, last_row - y), size = rows * s.width * w;
      b.dz.need(bands.t, n, y, rows, [&](int64_t first, int64_t last) {
        if (next < first) go(next, minimum(first, own_last), false);
        go(first, last, true);
        next = maximum(next, last);
      });
      for (int64_t i = 0; i < blocks; ++i)
        depthwise_rows(bands.t, b.dz, b.dz_taps, i, y, rows,
                       flipped + (first_block + i) * s.kernel_h * s.kernel_w * w, Vec<T>(T(0)),
                       b.out + i * size);
      write_dx(b.out, n, first_block, blocks, y, rows);
    }
    if (p.grad_weight && next < own_last) go(next, own_last, false);
  }

  void add_up(const Parallel& parallel) const {
    const int64_t taps = s.kernel_h * s.kernel_w, runs = s.batch * bands.bands;
    T *weight = static_cast<T*>(p.grad_weight), *bias = static_cast<T*>(p.grad_bias);
    parallel(bands.blocks, runs * bands.blocks * bands.sums > 65536, [&](int64_t begin, int64_t end, int) {
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t t = 0; t <= taps; ++t) {
          Vec<T> total(T(0));
          for (int64_t run = 0; run < runs; ++run)
            total = total + Vec<T>::load(partial + (run * bands.blocks + b) * bands.sums + t * w);
          T lanes[w];
          total.store(lanes);
          for (int64_t c = b * w; c < minimum(s.channels, (b + 1) * w); ++c) {
            if (t < taps)
              weight[c * taps + t] = lanes[c - b * w];
            else if (bias)
              bias[c] = lanes[c - b * w];
          }
        }
      }
    });
  }

  void run(const Parallel& parallel) const {
    source.pack(p.weight, p.bias);
    pack_depthwise(s.channels, s.kernel_h * s.kernel_w, true, static_cast<const S*>(p.weight), flipped);
    const bool worth_it = s.batch * s.height * s.width * s.channels * s.kernel_h * s.kernel_w > kSerialFlops;
    parallel(bands.tasks(), worth_it, [&](int64_t begin, int64_t end, int thread) {
      Carver own = threads.of(thread);
      Buffers buffers(*this, own);
      buffers.in.clear();
      buffers.dz.clear();
      for (int64_t task = end; task-- > begin;) run_task(buffers, task);
    });
    if (p.grad_weight) add_up(parallel);
  }
};

}  // namespace fusednn::cpu::FUSEDNN_ISA
