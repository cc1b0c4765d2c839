// The gated modal convolution of one sequence, with channels in the lanes:
//   z = x1 v        s[n] = lambda[n] s[n] + z        y = x0 (sum_n Re(R[n] s[n]) + D z)
// A tile of channels passes over all tokens. For a few tokens state and constants are used where they lie; for
// more they are gathered first, as their rows lie a multiple of the width apart, which is bad for a cache.
#include "loops.h"

#include "../native/simd.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int kTile = 4;  // vectors of channels
constexpr int64_t kWidth = kTile * kLanes;
// Fewer tokens don't earn back the copies.
constexpr int64_t kGatherFrom = 4;

// Where a tile's poles, residues and state are: row 2 n + part is `stride` floats behind the one before.
struct Rows {
  const float *poles, *residues, *from;
  float* to;
  int64_t stride;
};

// What is there of vector i of a tile of `width` channels; zeros behind.
XEXPORT_INLINE Vec some(const float* p, int i, int64_t width) {
  const int64_t left = width - i * kLanes;
  return left >= kLanes ? load(p + i * kLanes) : load_part(p + i * kLanes, left > 0 ? left : 0);
}
XEXPORT_INLINE void store_some(float* p, int i, int64_t width, Vec value) {
  const int64_t left = width - i * kLanes;
  if (left >= kLanes) {
    store(p + i * kLanes, value);
  } else if (left > 0) {
    store_part(p + i * kLanes, value, left);
  }
}

// Part: the tile has `width` < kWidth channels.
template <bool Part>
XEXPORT_INLINE void tile(const ModalConv& x, int64_t first, int64_t width, Rows rows) {
  if (!Part) width = kWidth;
  Vec skip[kTile];
  for (int i = 0; i < kTile; ++i) skip[i] = some(x.skip + first, i, width);
  for (int64_t t = 0; t < x.tokens; ++t) {
    const float* now = x.packed + 3 * t * x.channels + first;
    Vec z[kTile], y[kTile];
    for (int i = 0; i < kTile; ++i) {
      z[i] = some(now + x.channels, i, width) * some(now + 2 * x.channels, i, width);
      y[i] = skip[i] * z[i];
    }
    for (int64_t n = 0; n < x.order; ++n) {
      const int64_t re = 2 * n * rows.stride, im = re + rows.stride;
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) {
        const int64_t at = i * kLanes;
        const Vec a = load(rows.poles + re + at), b = load(rows.poles + im + at);
        const Vec c = load(rows.from + re + at), d = load(rows.from + im + at);
        const Vec real = a * c - b * d + z[i], imaginary = a * d + b * c;
        store(rows.to + re + at, real);
        store(rows.to + im + at, imaginary);
        y[i] += load(rows.residues + re + at) * real - load(rows.residues + im + at) * imaginary;
      }
    }
    for (int i = 0; i < kTile; ++i) {
      store_some(x.y + t * x.channels + first, i, width, y[i] * some(now, i, width));
    }
    rows.from = rows.to;
  }
}

// Rows of a tile become dense rows of kWidth, zeros behind the last channel.
void gather(const float* from, int64_t stride, int64_t rows, int64_t width, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int i = 0; i < kTile; ++i) store(to + r * kWidth + i * kLanes, some(from + r * stride, i, width));
  }
}

void gathered(const ModalConv& x, int64_t first, int64_t width, float* scratch) {
  const int64_t rows = 2 * x.order;
  float *poles = scratch, *residues = poles + rows * kWidth, *state = residues + rows * kWidth;
  gather(x.poles + first, x.channels, rows, width, poles);
  gather(x.residues + first, x.channels, rows, width, residues);
  gather(x.state + first, x.channels, rows, width, state);
  const Rows dense = {poles, residues, state, state, kWidth};
  width == kWidth ? tile<false>(x, first, width, dense) : tile<true>(x, first, width, dense);
  for (int64_t r = 0; r < rows; ++r) {
    for (int i = 0; i < kTile; ++i) {
      store_some(x.new_state + r * x.channels + first, i, width, load(state + r * kWidth + i * kLanes));
    }
  }
}

void run(const ModalConv& x, int64_t first, int64_t last, float* scratch) {
  for (int64_t d = first; d < last; d += kWidth) {
    const int64_t width = last - d < kWidth ? last - d : kWidth;
    if (x.tokens < kGatherFrom && width == kWidth) {
      tile<false>(x, d, width, {x.poles + d, x.residues + d, x.state + d, x.new_state + d, x.channels});
    } else {
      gathered(x, d, width, scratch);
    }
  }
}

int64_t scratch_size(int64_t order) { return 6 * order * kWidth; }

}  // namespace

const ModalConvLoops modal_conv_loops = {run, scratch_size};

}  // namespace xexport::XEXPORT_ISA
