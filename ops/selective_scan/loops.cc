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

// kWidth channels, or what is left of them; behind the last one the lanes hold zeros.
struct Block {
  float *h, *A, *step;  // [size, kWidth]; step[n] = A[n] - A[n - 1]
  // |dt| below which every dt A is a normal power, and every dt step one that exp2_short takes
  Vec normal[kBlock], even[kBlock];
  Vec skip[kBlock];
  int64_t first, width;
};

// Whole: all kWidth channels exist.
template <bool Whole>
XEXPORT_INLINE void load_channels(const Block& block, const float* from, Vec* to) {
  alignas(kBytes) float part[kWidth];
  if (!Whole) {
    for (int q = 0; q < kBlock; ++q) store(part + q * kLanes, Vec{});
    std::memcpy(part, from, static_cast<size_t>(block.width) * sizeof(float));
    from = part;
  }
  for (int q = 0; q < kBlock; ++q) to[q] = load(from + q * kLanes);
}

template <bool Whole>
XEXPORT_INLINE void store_channels(const Block& block, const Vec* from, float* to) {
  alignas(kBytes) float part[kWidth];
  for (int q = 0; q < kBlock; ++q) store((Whole ? to : part) + q * kLanes, from[q]);
  if (!Whole) std::memcpy(to, part, static_cast<size_t>(block.width) * sizeof(float));
}

// How a token's decays are made.
enum class Decays {
  careful,  // of any numbers
  normal,   // exp2_normal
  even,     // exp(dt A[n]) = exp(dt A[n - 1]) exp(dt step[n]), and every kTogether-th afresh
};
constexpr int64_t kTogether = 4;

// Up to which dt the ways of making decays hold; where A is no number, up to none.
void set_limits(Block& block, int64_t size) {
  for (int q = 0; q < kBlock; ++q) {
    Vec most = {}, steepest = size % kTogether == 0 ? Vec{} : all(__builtin_inff());
    IntVec known = IntVec{} - 1;
    for (int64_t n = 0; n < size; ++n) {
      const int64_t at = n * kWidth + q * kLanes;
      const Vec A = load(block.A + at), size_of = magnitude(A);
      most = size_of <= most ? most : size_of;
      known &= A == A;
      if (n % kTogether == 0) continue;
      const Vec step = A - load(block.A + at - kWidth);
      store(block.step + at, step);
      steepest = magnitude(step) <= steepest ? steepest : magnitude(step);
    }
    block.normal[q] = known ? all(125.0f / kLog2E) / most : Vec{};
    const Vec even = all(0.5f / kLog2E) / steepest;
    block.even[q] = even < block.normal[q] ? even : block.normal[q];
  }
}

void fill(const SelectiveScan& x, int64_t first, int64_t last, float* memory, Block& block) {
  const int64_t size = x.size, cells = size * kWidth, width = last - first < kWidth ? last - first : kWidth;
  block = {memory, memory + cells, memory + 2 * cells, {}, {}, {}, first, width};
  if (width < kWidth) std::memset(memory, 0, static_cast<size_t>(2 * cells) * sizeof(float));
  transpose(x.state + first * size, size, width, size, block.h, kWidth);
  transpose(x.A + first * size, size, width, size, block.A, kWidth);
  width == kWidth ? load_channels<true>(block, x.D + first, block.skip)
                  : load_channels<false>(block, x.D + first, block.skip);
  set_limits(block, size);
}

template <bool Whole>
XEXPORT_INLINE Decays decays_of(const SelectiveScan& x, const Block& block, int64_t t) {
  Vec dt[kBlock];
  load_channels<Whole>(block, x.dt + t * x.channels + block.first, dt);
  IntVec normal = IntVec{} - 1, even = normal;
  for (int q = 0; q < kBlock; ++q) {
    normal &= magnitude(dt[q]) < block.normal[q];
    even &= magnitude(dt[q]) < block.even[q];
  }
  return in_every_lane(even) ? Decays::even : in_every_lane(normal) ? Decays::normal : Decays::careful;
}

// Row n of a block.
XEXPORT_INLINE void update_row(const Vec* decay, const Vec* added, const float* B, const float* C, int64_t n,
                               float* h, Vec* y) {
  const Vec b = all(B[n]), c = all(C[n]);
#pragma GCC unroll 4
  for (int q = 0; q < kBlock; ++q) {
    const int64_t cell = n * kWidth + q * kLanes;
    const Vec next = decay[q] * load(h + cell) + added[q] * b;
    store(h + cell, next);
    y[q] += next * c;
  }
}

// All rows of a block; dt is scaled by log2(e).
template <Decays How>
XEXPORT_INLINE void update_block(const Vec* dt, const Vec* added, const float* B, const float* C, int64_t size,
                                 const Block& block, Vec* y) {
  constexpr int64_t kRows = How == Decays::even ? kTogether : 1;
  const float *A = block.A, *step = block.step;
  float* h = block.h;
#pragma GCC unroll 1
  for (int64_t n = 0; n < size; n += kRows) {
    Vec decay[kBlock];
#pragma GCC unroll 4
    for (int q = 0; q < kBlock; ++q) decay[q] = no_product(dt[q] * load(A + n * kWidth + q * kLanes));
    if (How == Decays::careful) {
      for (int q = 0; q < kBlock; ++q) decay[q] = exp2_any(decay[q]);
    } else {
      exp2_normal<kBlock>(decay);
    }
    update_row(decay, added, B, C, n, h, y);
#pragma GCC unroll 4
    for (int64_t i = n + 1; i < n + kRows; ++i) {
#pragma GCC unroll 4
      for (int q = 0; q < kBlock; ++q) decay[q] *= exp2_short(dt[q] * load(step + i * kWidth + q * kLanes));
      update_row(decay, added, B, C, i, h, y);
    }
  }
}

// Tokens from .. to - 1 of a block. The next block's are asked for meanwhile: the rows of tokens lie in
// different pages, so no prefetcher of a processor guesses them.
template <Decays How, bool Whole>
__attribute__((noinline)) void tokens(const SelectiveScan& scan, const Block& channels, int64_t from, int64_t to,
                                      int64_t ahead) {
  const SelectiveScan x = scan;  // what is stored might be its sizes, for all the compiler knows
  const Block block = channels;
  for (int64_t t = from; t < to; ++t) {
    const int64_t row = t * x.channels + block.first;
    __builtin_prefetch(x.dt + row + ahead + kWidth - 1);
    __builtin_prefetch(x.u + row + ahead + kWidth - 1);
    __builtin_prefetch(x.y + row + ahead + kWidth - 1, 1);
    Vec dt[kBlock], u[kBlock], added[kBlock], y[kBlock];
    load_channels<Whole>(block, x.dt + row, dt);
    load_channels<Whole>(block, x.u + row, u);
    for (int q = 0; q < kBlock; ++q) {
      added[q] = dt[q] * u[q];
      y[q] = block.skip[q] * u[q];
      dt[q] *= all(kLog2E);
    }
    update_block<How>(dt, added, x.B + t * x.size, x.C + t * x.size, x.size, block, y);
    store_channels<Whole>(block, y, x.y + row);
  }
}

template <bool Whole>
void columns(const SelectiveScan& x, const Block& block, int64_t from, int64_t to, int64_t ahead) {
  while (from < to) {
    const Decays how = decays_of<Whole>(x, block, from);
    int64_t end = from + 1;
    while (end < to && decays_of<Whole>(x, block, end) == how) ++end;
    if (how == Decays::even) {
      tokens<Decays::even, Whole>(x, block, from, end, ahead);
    } else if (how == Decays::normal) {
      tokens<Decays::normal, Whole>(x, block, from, end, ahead);
    } else {
      tokens<Decays::careful, Whole>(x, block, from, end, ahead);
    }
    from = end;
  }
}

// Tokens that a block does before the next one's turn.
constexpr int64_t kTokens = 16;
constexpr int kBlocks = static_cast<int>(kScanChannels / kWidth);

void by_columns(const SelectiveScan& x, int64_t first, int64_t last, float* scratch) {
  Block blocks[kBlocks];
  int count = 0;
  for (int64_t d = first; d < last; d += kWidth, ++count) {
    fill(x, d, last, scratch + count * 3 * x.size * kWidth, blocks[count]);
  }
  for (int64_t t = 0; t < x.tokens; t += kTokens) {
    const int64_t end = t + kTokens < x.tokens ? t + kTokens : x.tokens;
    // behind the last block comes the first one, with the tokens after these
    const int64_t back = end + kTokens <= x.tokens ? kTokens * x.channels - (count - 1) * kWidth : 0;
    for (int i = 0; i < count; ++i) {
      const int64_t ahead = i + 1 < count ? kWidth : back;
      blocks[i].width == kWidth ? columns<true>(x, blocks[i], t, end, ahead)
                                : columns<false>(x, blocks[i], t, end, ahead);
    }
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

int64_t scratch_size(int64_t size) { return 3 * size * kScanChannels; }

}  // namespace

const SelectiveScanLoops selective_scan_loops = {run, scratch_size};

}  // namespace xexport::XEXPORT_ISA
