// The selective scan of one sequence, in two ways.
//
//   h[d,n] = exp(dt[d] A[d,n]) h[d,n] + dt[d] u[d] B[n]        y[d] = sum_n h[d,n] C[n] + D[d] u[d]
//
// `steps` has n in the lanes, as the state lies in memory: for a token or a few, and sizes that are whole
// vectors. `columns` turns a block of channels into lanes, keeps its state in the cache over all tokens,
// and takes any size.
#include "loops.h"

#include "../native/exp.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int kBlock = 2;  // vectors of channels at a time: a cache line of u, dt and y for AVX2
constexpr int kWidth = kBlock * kLanes;
// Shorter pieces don't earn back the transpositions (measured).
constexpr int64_t kColumnsFrom = 4;

// Whether exp(dt A) is a normal number for `width` channels from `first` and every n.
template <int Size>
XEXPORT_INLINE bool decays_normally(const SelectiveScan& x, int64_t row, int64_t first, int64_t width) {
  const int64_t size = Size > 0 ? Size : x.size;
  IntVec normal = IntVec{} - 1;
  for (int64_t i = 0; i < width; ++i) {
    const Vec dt = all(x.dt[row + i] * kLog2E);
    for (int64_t n = 0; n < size; n += kLanes) normal &= is_normal_power(dt * load(x.A + (first + i) * size + n));
  }
  return in_every_lane(normal);
}

// Of `width` <= kLanes channels from `first`: the new state, and <h, C> in the lanes of `read`.
template <int Size, bool Careful>
XEXPORT_INLINE void update(const SelectiveScan& x, int64_t t, int64_t first, int64_t width, const float* from,
                           Vec* read) {
  const int64_t size = Size > 0 ? Size : x.size, row = t * x.channels + first;
  const float *B = x.B + t * size, *C = x.C + t * size;
#pragma GCC unroll 2
  for (int64_t i = 0; i < width; ++i) {
    const Vec dt = all(x.dt[row + i] * kLog2E), added = all(x.dt[row + i] * x.u[row + i]);
    const int64_t cell = (first + i) * size;
    Vec sum = {};
    for (int64_t n = 0; n < size; n += kLanes) {
      const Vec A = load(x.A + cell + n);
      const Vec decay = Careful ? exp2_any(dt, A) : exp2_normal(dt, A);
      const Vec h = decay * load(from + cell + n) + added * load(B + n);
      store(x.new_state + cell + n, h);
      sum += h * load(C + n);
    }
    read[i] = sum;
  }
}

// One token of `width` <= kLanes channels. Size: the state's, whole vectors, or 0 if known at run time only.
template <int Size>
XEXPORT_INLINE void step(const SelectiveScan& x, int64_t t, int64_t first, int64_t width, const float* from) {
  const int64_t row = t * x.channels + first;
  Vec read[kLanes];
  for (int64_t i = width; i < kLanes; ++i) read[i] = Vec{};
  if (decays_normally<Size>(x, row, first, width)) {
    update<Size, false>(x, t, first, width, from, read);
  } else {
    update<Size, true>(x, t, first, width, from, read);
  }
  transpose(read);
  Vec y = read[0];
  for (int i = 1; i < kLanes; ++i) y += read[i];
  if (width == kLanes) {
    store(x.y + row, y + load(x.u + row) * load(x.D + first));
  } else {
    y += load_part(x.u + row, width) * load_part(x.D + first, width);
    store_part(x.y + row, y, width);
  }
}

template <int Size>
void steps(const SelectiveScan& x, int64_t first, int64_t last) {
  for (int64_t d = first; d < last; d += kLanes) {
    for (int64_t t = 0; t < x.tokens; ++t) {
      const float* from = t == 0 ? x.state : x.new_state;
      if (d + kLanes <= last) {
        step<Size>(x, t, d, kLanes, from);
      } else {
        step<Size>(x, t, d, last - d, from);
      }
    }
  }
}

// One token of a block of channels; h and A are [size, kWidth], dt is scaled by log2(e). Careful: exp(dt A)
// need not be a normal number.
template <bool Careful>
XEXPORT_INLINE void token(const Vec* dt, const Vec* added, const float* A, const float* B, const float* C,
                          int64_t size, float* h, Vec* y) {
  for (int64_t n = 0; n < size; ++n) {
    const Vec b = all(B[n]), c = all(C[n]);
#pragma GCC unroll 4
    for (int q = 0; q < kBlock; ++q) {
      const int64_t cell = n * kWidth + q * kLanes;
      const Vec decay = Careful ? exp2_any(dt[q], load(A + cell)) : exp2_normal(dt[q], load(A + cell));
      const Vec next = decay * load(h + cell) + added[q] * b;
      store(h + cell, next);
      y[q] += next * c;
    }
  }
}

// Channels first .. first + width - 1, width <= kWidth.
void columns(const SelectiveScan& x, int64_t first, int64_t width, float* scratch) {
  const int64_t size = x.size;
  float *h = scratch, *A = scratch + size * kWidth;
  if (width < kWidth) std::memset(scratch, 0, static_cast<size_t>(2 * size * kWidth) * sizeof(float));
  transpose(x.state + first * size, size, width, size, h, kWidth);
  transpose(x.A + first * size, size, width, size, A, kWidth);
  Vec low[kBlock] = {}, high[kBlock] = {};  // the least and the greatest A of a channel, and 0
  for (int64_t n = 0; n < size; ++n) {
    for (int q = 0; q < kBlock; ++q) {
      const Vec a = load(A + n * kWidth + q * kLanes);
      low[q] = a >= low[q] ? low[q] : a;  // a NaN gets in, and makes every token a careful one
      high[q] = a <= high[q] ? high[q] : a;
    }
  }
  alignas(kBytes) float skip[kWidth] = {}, steps[kWidth] = {}, inputs[kWidth] = {};
  std::memcpy(skip, x.D + first, static_cast<size_t>(width) * sizeof(float));
  const size_t bytes = static_cast<size_t>(width) * sizeof(float);
  for (int64_t t = 0; t < x.tokens; ++t) {
    const int64_t row = t * x.channels + first;
    if (width == kWidth) {
      std::memcpy(steps, x.dt + row, sizeof(steps));
      std::memcpy(inputs, x.u + row, sizeof(inputs));
      if (t + 4 < x.tokens) {
        __builtin_prefetch(x.dt + row + 4 * x.channels);
        __builtin_prefetch(x.u + row + 4 * x.channels);
        __builtin_prefetch(x.y + row + 4 * x.channels, 1);
      }
    } else {
      std::memcpy(steps, x.dt + row, bytes);
      std::memcpy(inputs, x.u + row, bytes);
    }
    Vec dt[kBlock], added[kBlock], y[kBlock];
    IntVec normal = IntVec{} - 1;
    for (int q = 0; q < kBlock; ++q) {
      const Vec u = load(inputs + q * kLanes);
      dt[q] = load(steps + q * kLanes) * all(kLog2E);
      added[q] = load(steps + q * kLanes) * u;
      y[q] = load(skip + q * kLanes) * u;
      // for a negative dt the ends change places
      normal &= is_normal_power(dt[q] * low[q]) & is_normal_power(dt[q] * high[q]);
    }
    const float *B = x.B + t * size, *C = x.C + t * size;
    if (in_every_lane(normal)) {
      token<false>(dt, added, A, B, C, size, h, y);
    } else {
      token<true>(dt, added, A, B, C, size, h, y);
    }
    if (width == kWidth) {
      for (int q = 0; q < kBlock; ++q) store(x.y + row + q * kLanes, y[q]);
    } else {
      for (int q = 0; q < kBlock; ++q) store(steps + q * kLanes, y[q]);
      std::memcpy(x.y + row, steps, bytes);
    }
  }
  transpose(h, kWidth, size, width, x.new_state + first * size, size);
}

void run(const SelectiveScan& x, int64_t first, int64_t last, float* scratch) {
  if (x.tokens < kColumnsFrom && x.size % kLanes == 0) {
    x.size == 16 ? steps<16>(x, first, last) : steps<0>(x, first, last);
    return;
  }
  for (int64_t d = first; d < last; d += kWidth) columns(x, d, last - d < kWidth ? last - d : kWidth, scratch);
}

int64_t scratch_size(int64_t size) { return 2 * size * kWidth; }

}  // namespace

const SelectiveScanLoops selective_scan_loops = {run, scratch_size};

}  // namespace xexport::XEXPORT_ISA
