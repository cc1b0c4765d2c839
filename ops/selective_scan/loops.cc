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
      Vec decay = no_product(dt * A);
      if (Careful) {
        decay = exp2_any(decay);
      } else {
        exp2_normal<1>(&decay);
      }
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

// exp(dt A) of a token and block, [size, kWidth]; dt is scaled by log2(e). Careful: they need not be normal.
template <bool Careful>
XEXPORT_INLINE void decays(const Vec* dt, const float* A, int64_t size, float* to) {
  constexpr int kMany = 4;  // vectors side by side
  int64_t at = 0;
  for (; !Careful && at + kMany * kLanes <= size * kWidth; at += kMany * kLanes) {
    Vec z[kMany];
#pragma GCC unroll 4
    for (int i = 0; i < kMany; ++i) z[i] = no_product(dt[i % kBlock] * load(A + at + i * kLanes));
    exp2_normal<kMany>(z);
#pragma GCC unroll 4
    for (int i = 0; i < kMany; ++i) store(to + at + i * kLanes, z[i]);
  }
  for (int64_t q = 0; at < size * kWidth; at += kLanes, ++q) {
    store(to + at, exp2_any(no_product(dt[q % kBlock] * load(A + at))));
  }
}

// One token of a block of channels; h and decay are [size, kWidth].
XEXPORT_INLINE void token(const float* decay, const Vec* added, const float* B, const float* C, int64_t size,
                          float* h, Vec* y) {
  for (int64_t n = 0; n < size; ++n) {
    const Vec b = all(B[n]), c = all(C[n]);
#pragma GCC unroll 4
    for (int q = 0; q < kBlock; ++q) {
      const int64_t cell = n * kWidth + q * kLanes;
      const Vec next = load(decay + cell) * load(h + cell) + added[q] * b;
      store(h + cell, next);
      y[q] += next * c;
    }
  }
}

// kWidth channels, or what is left of them; behind the last one the lanes hold zeros.
struct Block {
  float *h, *A;    // [size, kWidth]
  Vec low[kBlock], high[kBlock];  // the least and the greatest A of a channel, and 0
  Vec skip[kBlock];
  int64_t first, width;
};

XEXPORT_INLINE void load_channels(const Block& block, const float* from, Vec* to) {
  alignas(kBytes) float part[kWidth] = {};
  if (block.width < kWidth) {
    std::memcpy(part, from, static_cast<size_t>(block.width) * sizeof(float));
    from = part;
  }
  for (int q = 0; q < kBlock; ++q) to[q] = load(from + q * kLanes);
}

XEXPORT_INLINE void store_channels(const Block& block, const Vec* from, float* to) {
  alignas(kBytes) float part[kWidth];
  float* whole = block.width < kWidth ? part : to;
  for (int q = 0; q < kBlock; ++q) store(whole + q * kLanes, from[q]);
  if (block.width < kWidth) std::memcpy(to, part, static_cast<size_t>(block.width) * sizeof(float));
}

void fill(const SelectiveScan& x, int64_t first, int64_t last, float* memory, Block& block) {
  const int64_t size = x.size, width = last - first < kWidth ? last - first : kWidth;
  block = {memory, memory + size * kWidth, {}, {}, {}, first, width};
  if (width < kWidth) std::memset(memory, 0, static_cast<size_t>(2 * size * kWidth) * sizeof(float));
  transpose(x.state + first * size, size, width, size, block.h, kWidth);
  transpose(x.A + first * size, size, width, size, block.A, kWidth);
  load_channels(block, x.D + first, block.skip);
  for (int64_t n = 0; n < size; ++n) {
    for (int q = 0; q < kBlock; ++q) {
      const Vec a = load(block.A + n * kWidth + q * kLanes);
      block.low[q] = a >= block.low[q] ? block.low[q] : a;  // a NaN gets in: every token is a careful one
      block.high[q] = a <= block.high[q] ? block.high[q] : a;
    }
  }
}

// Tokens from .. to - 1 of a block. The next block's are asked for meanwhile: the rows of tokens lie in
// different pages, so no prefetcher of a processor guesses them.
void columns(const SelectiveScan& x, const Block& block, int64_t from, int64_t to, int64_t ahead,
             float* decay) {
  for (int64_t t = from; t < to; ++t) {
    const int64_t row = t * x.channels + block.first;
    __builtin_prefetch(x.dt + row + ahead);
    __builtin_prefetch(x.u + row + ahead);
    __builtin_prefetch(x.y + row + ahead, 1);
    Vec dt[kBlock], u[kBlock], added[kBlock], y[kBlock];
    load_channels(block, x.dt + row, dt);
    load_channels(block, x.u + row, u);
    IntVec normal = IntVec{} - 1;
    for (int q = 0; q < kBlock; ++q) {
      added[q] = dt[q] * u[q];
      y[q] = block.skip[q] * u[q];
      dt[q] *= all(kLog2E);
      // for a negative dt the ends change places
      normal &= is_normal_power(dt[q] * block.low[q]) & is_normal_power(dt[q] * block.high[q]);
    }
    const float *B = x.B + t * x.size, *C = x.C + t * x.size;
    if (in_every_lane(normal)) {
      decays<false>(dt, block.A, x.size, decay);
    } else {
      decays<true>(dt, block.A, x.size, decay);
    }
    token(decay, added, B, C, x.size, block.h, y);
    store_channels(block, y, x.y + row);
  }
}

// Tokens that a block does before the next one's turn.
constexpr int64_t kTokens = 16;
constexpr int kBlocks = static_cast<int>(kScanChannels / kWidth);

void by_columns(const SelectiveScan& x, int64_t first, int64_t last, float* scratch) {
  Block blocks[kBlocks];
  int count = 0;
  float* decay = scratch + 2 * x.size * kScanChannels;
  for (int64_t d = first; d < last; d += kWidth, ++count) {
    fill(x, d, last, scratch + count * 2 * x.size * kWidth, blocks[count]);
  }
  for (int64_t t = 0; t < x.tokens; t += kTokens) {
    const int64_t end = t + kTokens < x.tokens ? t + kTokens : x.tokens;
    // behind the last block comes the first one, with the tokens after these
    const int64_t back = end + kTokens <= x.tokens ? kTokens * x.channels - (count - 1) * kWidth : 0;
    for (int i = 0; i < count; ++i) columns(x, blocks[i], t, end, i + 1 < count ? kWidth : back, decay);
  }
  for (int i = 0; i < count; ++i) {
    const Block& block = blocks[i];
    transpose(block.h, kWidth, x.size, block.width, x.new_state + block.first * x.size, x.size);
  }
}

void run(const SelectiveScan& x, int64_t first, int64_t last, float* scratch) {
  if (x.tokens < kColumnsFrom && x.size % kLanes == 0) {
    x.size == 16 ? steps<16>(x, first, last) : steps<0>(x, first, last);
  } else {
    by_columns(x, first, last, scratch);
  }
}

int64_t scratch_size(int64_t size) { return size * (2 * kScanChannels + kWidth); }

}  // namespace

const SelectiveScanLoops selective_scan_loops = {run, scratch_size};

}  // namespace xexport::XEXPORT_ISA
