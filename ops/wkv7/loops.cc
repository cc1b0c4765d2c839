// RWKV-7's recurrence for one head, in two ways that divide the state differently.
//
// Row v of the state S[v,k] evolves by itself:
//   u = <S[v], a>    S[v] = S[v] * w + u b + v_v k    y_v = <S[v], r>
// `rows` keeps k in the lanes and takes the state as it lies in memory, at the price of a sum over lanes for
// every u and y. `columns` turns a tile of rows so that v is in the lanes; that costs a transposition at
// either end and saves the sums, and the product with the next token's `a` is taken while the state passes.
#include "loops.h"

#include "../native/simd.h"

namespace xexport::XEXPORT_ISA {
namespace {

// Vectors of a tile of `columns`: 3 accumulators each, and 5 broadcasts, have to fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__) || defined(__AVX2__)
constexpr int kTile = 4;
#else
constexpr int kTile = 2;
#endif
constexpr int kTileWidth = kTile * kLanes;
// Shorter pieces don't earn back the transpositions (measured).
constexpr int64_t kColumnsFrom = 8;

// Sums of the lanes of kLanes vectors, in one vector.
XEXPORT_INLINE Vec sums(Vec* v) {
  transpose(v);
  Vec total = v[0];
  for (int i = 1; i < kLanes; ++i) total += v[i];
  return total;
}

// kLanes rows of one token. Size: the head's, a whole number of vectors, or 0 for one known at run time only.
template <int Size>
XEXPORT_INLINE void step(const Wkv7Head& x, int64_t at, int64_t row, const float* from, float* to) {
  constexpr int kAtOnce = 4;  // rows that share the loads of w, b, k and r
  const int64_t size = Size > 0 ? Size : x.size;
  const float *r = x.r + at, *w = x.w + at, *k = x.k + at, *a = x.a + at, *b = x.b + at;
  Vec partial[kLanes] = {};
  for (int64_t j = 0; j < size; j += kLanes) {
    const Vec aj = load(a + j);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) partial[i] += load(from + i * size + j) * aj;
  }
  // kept apart from the state: the compiler can't know that storing the state doesn't change v
  alignas(kBytes) float u[kLanes], v[kLanes];
  store(u, sums(partial));
  store(v, load(x.v + at + row));
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += kAtOnce) {
    Vec ui[kAtOnce], vi[kAtOnce], read[kAtOnce] = {};
    for (int q = 0; q < kAtOnce; ++q) {
      ui[q] = all(u[i + q]);
      vi[q] = all(v[i + q]);
    }
    for (int64_t j = 0; j < size; j += kLanes) {
      const Vec wj = load(w + j), bj = load(b + j), kj = load(k + j), rj = load(r + j);
#pragma GCC unroll 4
      for (int q = 0; q < kAtOnce; ++q) {
        const Vec s = load(from + (i + q) * size + j) * wj + ui[q] * bj + vi[q] * kj;
        store(to + (i + q) * size + j, s);
        read[q] += s * rj;
      }
    }
    for (int q = 0; q < kAtOnce; ++q) partial[i + q] = read[q];
  }
  store(x.y + at + row, sums(partial));
}

// One row of one token, for any size.
void step_row(const Wkv7Head& x, int64_t at, int64_t row, const float* from, float* to) {
  const float v = x.v[at + row];
  float u = 0, y = 0;
  for (int64_t j = 0; j < x.size; ++j) u += from[j] * x.a[at + j];
  for (int64_t j = 0; j < x.size; ++j) {
    const float s = from[j] * x.w[at + j] + u * x.b[at + j] + v * x.k[at + j];
    to[j] = s;
    y += s * x.r[at + j];
  }
  x.y[at + row] = y;
}

template <int Size>
void rows(const Wkv7Head& x) {
  const int64_t size = Size > 0 ? Size : x.size, height = size % kLanes == 0 ? kLanes : 1;
  for (int64_t row = 0; row < size; row += height) {
    float* to = x.new_state + row * size;
    for (int64_t t = 0; t < x.tokens; ++t) {
      const float* from = t == 0 ? x.state + row * size : to;
      if (height == kLanes) {
        step<Size>(x, t * x.stride, row, from, to);
      } else {
        step_row(x, t * x.stride, row, from, to);
      }
    }
  }
}

// Whole: the tile has kTileWidth columns; else `width`, and the lanes behind hold zeros that nobody reads.
template <bool Whole>
void columns(const Wkv7Head& x, int64_t first, int64_t width, float* tile) {
  const int64_t size = x.size;
  if (!Whole) std::memset(tile, 0, static_cast<size_t>(size * kTileWidth) * sizeof(float));
  transpose(x.state + first * size, size, width, size, tile, kTileWidth);
  Vec u[kTile] = {};
  for (int64_t j = 0; j < size; ++j) {
    for (int q = 0; q < kTile; ++q) u[q] += load(tile + j * kTileWidth + q * kLanes) * all(x.a[j]);
  }
  alignas(kBytes) float values[kTileWidth] = {};
  for (int64_t t = 0; t < x.tokens; ++t) {
    const int64_t at = t * x.stride;
    const float *r = x.r + at, *w = x.w + at, *k = x.k + at, *b = x.b + at;
    const float* a = x.a + (t + 1 < x.tokens ? at + x.stride : at);  // the next token's
    float* y = x.y + at + first;
    std::memcpy(values, x.v + at + first, static_cast<size_t>(Whole ? kTileWidth : width) * sizeof(float));
    Vec v[kTile], read[kTile] = {}, next[kTile] = {};
    for (int q = 0; q < kTile; ++q) v[q] = load(values + q * kLanes);
    for (int64_t j = 0; j < size; ++j) {
      const Vec wj = all(w[j]), bj = all(b[j]), kj = all(k[j]), rj = all(r[j]), aj = all(a[j]);
      for (int q = 0; q < kTile; ++q) {
        float* cell = tile + j * kTileWidth + q * kLanes;
        const Vec s = load(cell) * wj + u[q] * bj + v[q] * kj;
        store(cell, s);
        read[q] += s * rj;
        next[q] += s * aj;
      }
    }
    for (int q = 0; q < kTile; ++q) {
      if (Whole) {
        store(y + q * kLanes, read[q]);
      } else {
        store(values + q * kLanes, read[q]);
      }
      u[q] = next[q];
    }
    if (!Whole) std::memcpy(y, values, static_cast<size_t>(width) * sizeof(float));
  }
  transpose(tile, kTileWidth, size, width, x.new_state + first * size, size);
}

void by_columns(const Wkv7Head& x, float* tile) {
  int64_t first = 0;
  for (; first + kTileWidth <= x.size; first += kTileWidth) columns<true>(x, first, kTileWidth, tile);
  if (first < x.size) columns<false>(x, first, x.size - first, tile);
}

void head(const Wkv7Head& x, float* scratch) {
  if (x.tokens < kColumnsFrom) {
    x.size == 64 ? rows<64>(x) : rows<0>(x);
  } else {
    by_columns(x, scratch);
  }
}

int64_t scratch_size(int64_t size) { return size * kTileWidth; }

}  // namespace

const Wkv7Loops wkv7_loops = {head, scratch_size};

}  // namespace xexport::XEXPORT_ISA
