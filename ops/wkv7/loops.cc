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
constexpr int kRows = 4;
// Shorter pieces don't earn back the transpositions (measured).
constexpr int64_t kColumnsFrom = 6;

template <int Rows>
void step(const Wkv7Head& x, int64_t token, int64_t row, const float* from, float* to) {
  const int64_t size = x.size, whole = size / kLanes * kLanes, at = token * x.stride;
  const float *r = x.r + at, *w = x.w + at, *k = x.k + at, *a = x.a + at, *b = x.b + at;
  const float* v = x.v + at + row;
  Vec partial[Rows] = {};
  for (int64_t j = 0; j < whole; j += kLanes) {
    const Vec aj = load(a + j);
    for (int i = 0; i < Rows; ++i) partial[i] += load(from + i * size + j) * aj;
  }
  float u[Rows];
  for (int i = 0; i < Rows; ++i) {
    u[i] = sum(partial[i]);
    for (int64_t j = whole; j < size; ++j) u[i] += from[i * size + j] * a[j];
  }
  Vec read[Rows] = {};
  for (int64_t j = 0; j < whole; j += kLanes) {
    const Vec wj = load(w + j), bj = load(b + j), kj = load(k + j), rj = load(r + j);
    for (int i = 0; i < Rows; ++i) {
      const Vec s = load(from + i * size + j) * wj + all(u[i]) * bj + all(v[i]) * kj;
      store(to + i * size + j, s);
      read[i] += s * rj;
    }
  }
  for (int i = 0; i < Rows; ++i) {
    float y = sum(read[i]);
    for (int64_t j = whole; j < size; ++j) {
      const float s = from[i * size + j] * w[j] + u[i] * b[j] + v[i] * k[j];
      to[i * size + j] = s;
      y += s * r[j];
    }
    x.y[at + row + i] = y;
  }
}

template <int Rows>
void rows(const Wkv7Head& x, int64_t row) {
  float* to = x.new_state + row * x.size;
  for (int64_t t = 0; t < x.tokens; ++t) step<Rows>(x, t, row, t == 0 ? x.state + row * x.size : to, to);
}

void by_rows(const Wkv7Head& x) {
  int64_t row = 0;
  for (; row + kRows <= x.size; row += kRows) rows<kRows>(x, row);
  for (; row < x.size; ++row) rows<1>(x, row);
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
    by_rows(x);
  } else {
    by_columns(x, scratch);
  }
}

int64_t scratch_size(int64_t size) { return size * kTileWidth; }

}  // namespace

const Wkv7Loops wkv7_loops = {head, scratch_size};

}  // namespace xexport::XEXPORT_ISA
