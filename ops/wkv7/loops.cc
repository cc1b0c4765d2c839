// RWKV-7's recurrence for one head, in two ways that divide the state differently.
//
// Row v of the state S[v,k] evolves by itself:
//   u = <S[v], a>    S[v] = S[v] * w + u b + v_v k    y_v = <S[v], r>
// `rows` keeps k in the lanes and takes the state as it lies in memory, at the price of a sum over lanes for
// every u and y. `columns` turns the state so that v is in the lanes; that costs a transposition at either
// end and saves the sums, and the product with the next token's `a` is taken while the state passes.
//
// Of the 5 multiplications an element and token, `columns` saves one: for some tokens it carries S / D, D
// being the product of their decays, which grows by u (b/D) and v (k/D) alone and is read with r D and a D.
// The divisions are of vectors, once a head. What is left, 4 multiply-adds, is also the least that a form in
// chunks of matrix products can have (two products read the state, two write it), and needs no others.
#include "loops.h"

#include "../native/simd.h"

namespace xexport::XEXPORT_ISA {
namespace {

// Vectors of a tile of `columns`. For each there are u, v and two sums, and then come 4 broadcasts and the
// state: with 16 registers a third vector would have to take some of them from memory (27% slower).
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTile = 4;
#else
constexpr int kTile = 2;
#endif
constexpr int kTileWidth = kTile * kLanes;
// Tokens that share one D, at most; it lies in (kLeast, 1], where 1/D costs no range and D grows nothing.
constexpr int64_t kShared = 16;
constexpr float kLeast = 0x1p-24f;
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

// Some columns of the turned state, [size, kTileWidth]; behind the last one the lanes hold zeros.
struct Tile {
  float* state;
  float* u;  // S a of the token that comes next
  int64_t first, width;
  bool overflowed;

  bool whole() const { return width == kTileWidth; }
};

XEXPORT_INLINE void load_values(const Tile& tile, const float* from, Vec* to) {
  alignas(kBytes) float part[kTileWidth] = {};
  if (!tile.whole()) {
    std::memcpy(part, from + tile.first, static_cast<size_t>(tile.width) * sizeof(float));
    from = part - tile.first;
  }
  for (int q = 0; q < kTile; ++q) to[q] = load(from + tile.first + q * kLanes);
}

XEXPORT_INLINE void store_values(const Tile& tile, const Vec* from, float* to) {
  alignas(kBytes) float part[kTileWidth];
  float* whole = tile.whole() ? to + tile.first : part;
  for (int q = 0; q < kTile; ++q) store(whole + q * kLanes, from[q]);
  if (!tile.whole()) std::memcpy(to + tile.first, part, static_cast<size_t>(tile.width) * sizeof(float));
}

// What `a` reads after token t: the next token's, or anything after the last one.
XEXPORT_INLINE int64_t next_at(const Wkv7Head& x, int64_t t) {
  return (t + 1 < x.tokens ? t + 1 : t) * x.stride;
}

// One token as it is written above.
void plain(const Wkv7Head& x, int64_t t, const Tile& tile) {
  const int64_t at = t * x.stride;
  const float *r = x.r + at, *w = x.w + at, *k = x.k + at, *b = x.b + at, *a = x.a + next_at(x, t);
  Vec u[kTile], v[kTile], read[kTile] = {}, next[kTile] = {};
  load_values(tile, x.v + at, v);
  for (int q = 0; q < kTile; ++q) u[q] = load(tile.u + q * kLanes);
  for (int64_t j = 0; j < x.size; ++j) {
    const Vec wj = all(w[j]), bj = all(b[j]), kj = all(k[j]), rj = all(r[j]), aj = all(a[j]);
    for (int q = 0; q < kTile; ++q) {
      float* cell = tile.state + j * kTileWidth + q * kLanes;
      const Vec s = load(cell) * wj + u[q] * bj + v[q] * kj;
      store(cell, s);
      read[q] += s * rj;
      next[q] += s * aj;
    }
  }
  for (int q = 0; q < kTile; ++q) store(tile.u + q * kLanes, next[q]);
  store_values(tile, read, x.y + at);
}

XEXPORT_INLINE Vec load_or(const float* p, int64_t n, float fill) {
  if (n >= kLanes) return load(p);
  alignas(kBytes) float lanes[kLanes];
  store(lanes, all(fill));
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(float));
  return load(lanes);
}

// Asks for a tile's part of the vectors of token t. They lie a whole row of heads apart, mostly in another
// page each, which no prefetcher of a processor guesses.
XEXPORT_INLINE void prefetch(const Wkv7Head& x, int64_t t, const Tile& tile) {
  constexpr int64_t kLine = 16;
  if (t >= x.tokens) return;
  for (int64_t j = tile.first; j < tile.first + tile.width; j += kLine) {
    const int64_t at = t * x.stride + j;
    __builtin_prefetch(x.w + at);
    __builtin_prefetch(x.b + at);
    __builtin_prefetch(x.k + at);
    __builtin_prefetch(x.r + at);
    __builtin_prefetch(x.a + at);
    __builtin_prefetch(x.v + at);
    __builtin_prefetch(x.y + at, 1);
  }
}

int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// Of the tokens from `first` on, as many as may share one D: their b/D, k/D, r D and the next token's a D,
// each `padded(size)` long, and the last D. None, if the first decay is 0, above 1 or no number.
int64_t share(const Wkv7Head& x, int64_t first, int64_t end, float* scaled, float* product) {
  const int64_t size = x.size, room = padded(size);
  for (int64_t j = 0; j < room; j += kLanes) store(product + j, all(1.0f));
  for (int64_t n = 0; n < end - first; ++n, scaled += 4 * room) {
    const int64_t at = (first + n) * x.stride, next = next_at(x, first + n);
    IntVec good = IntVec{} - 1;
    for (int64_t j = 0; j < size; j += kLanes) {
      const Vec D = load(product + j) * load_or(x.w + at + j, size - j, 1.0f);
      good &= (D > all(kLeast)) & (D <= all(1.0f));
    }
    if (!in_every_lane(good)) return n;
    for (int64_t j = 0; j < size; j += kLanes) {
      const int64_t n_lanes = size - j;
      const Vec D = load(product + j) * load_or(x.w + at + j, n_lanes, 1.0f), undo = all(1.0f) / D;
      store(product + j, D);
      store(scaled + j, undo * load_or(x.b + at + j, n_lanes, 0.0f));
      store(scaled + room + j, undo * load_or(x.k + at + j, n_lanes, 0.0f));
      store(scaled + 2 * room + j, D * load_or(x.r + at + j, n_lanes, 0.0f));
      store(scaled + 3 * room + j, D * load_or(x.a + next + j, n_lanes, 0.0f));
    }
  }
  return end - first;
}

// One token with shared D. Last: of those that share it, so the state is multiplied by D again, and `bad`
// becomes NaN where it is infinite or NaN.
template <bool Last>
XEXPORT_INLINE void pass(float* state, const float* scaled, const float* product, int64_t size, Vec* u,
                         const Vec* v, Vec* read, Vec& bad) {
  const int64_t room = padded(size);
  const float *b = scaled, *k = b + room, *r = k + room, *a = r + room;
  Vec next[kTile] = {};
  for (int64_t j = 0; j < size; ++j) {
    const Vec bj = all(b[j]), kj = all(k[j]), rj = all(r[j]), aj = all(a[j]);
    for (int q = 0; q < kTile; ++q) {
      float* cell = state + j * kTileWidth + q * kLanes;
      Vec s = load(cell) + u[q] * bj;
      s += v[q] * kj;
      read[q] += s * rj;
      next[q] += s * aj;
      if (Last) {
        s *= all(product[j]);
        bad += s * all(0.0f);
      }
      store(cell, s);
    }
  }
  for (int q = 0; q < kTile; ++q) u[q] = next[q];
}

// `count` tokens with shared D. Whatever overflowed on the way, though S did not, leaves its mark on the state
// or on y, as nothing turns infinity back into a number.
void shared(const Wkv7Head& x, int64_t first, int64_t count, const float* scaled, const float* product,
            Tile& tile) {
  const int64_t step = 4 * padded(x.size);
  Vec u[kTile], bad = {};
  for (int q = 0; q < kTile; ++q) u[q] = load(tile.u + q * kLanes);
  for (int64_t n = 0; n < count; ++n, scaled += step) {
    const int64_t at = (first + n) * x.stride;
    Vec v[kTile], read[kTile] = {};
    load_values(tile, x.v + at, v);
    prefetch(x, first + n + kShared, tile);
    if (n + 1 < count) {
      pass<false>(tile.state, scaled, product, x.size, u, v, read, bad);
    } else {
      pass<true>(tile.state, scaled, product, x.size, u, v, read, bad);
    }
    for (int q = 0; q < kTile; ++q) bad += read[q] * all(0.0f);
    store_values(tile, read, x.y + at);
  }
  for (int q = 0; q < kTile; ++q) store(tile.u + q * kLanes, u[q]);
  tile.overflowed |= !in_every_lane(bad == Vec{});
}

// Puts columns `first` .. of the state and the first token's u into a tile.
void fill(const Wkv7Head& x, int64_t first, float* memory, Tile& tile) {
  const int64_t size = x.size, cells = size * kTileWidth, left = size - first;
  tile = {memory, memory + cells, first, left < kTileWidth ? left : kTileWidth, false};
  if (!tile.whole()) std::memset(tile.state, 0, static_cast<size_t>(cells) * sizeof(float));
  transpose(x.state + first * size, size, tile.width, size, tile.state, kTileWidth);
  Vec u[kTile] = {};
  for (int64_t j = 0; j < size; ++j) {
    for (int q = 0; q < kTile; ++q) u[q] += load(tile.state + j * kTileWidth + q * kLanes) * all(x.a[j]);
  }
  for (int q = 0; q < kTile; ++q) store(tile.u + q * kLanes, u[q]);
}

// Writes the state; if sharing has overflowed, all tokens are done first once more, without.
void finish(const Wkv7Head& x, Tile& tile) {
  if (tile.overflowed) {
    fill(x, tile.first, tile.state, tile);
    for (int64_t t = 0; t < x.tokens; ++t) plain(x, t, tile);
  }
  transpose(tile.state, kTileWidth, x.size, tile.width, x.new_state + tile.first * x.size, x.size);
}

// Floats of one tile, and of what all tiles read.
int64_t tile_floats(int64_t size) { return (size + 1) * kTileWidth; }
int64_t scaled_floats(int64_t size) { return (4 * kShared + 1) * padded(size); }

// Tiles of a head that are done together: their state and the scaled vectors should stay in the cache.
constexpr int kTiles = 8;

void columns(const Wkv7Head* heads, int64_t many, int64_t first, float* scratch) {
  const int64_t size = heads[0].size, tokens = heads[0].tokens;
  float *product = scratch + 4 * kShared * padded(size), *memory = scratch + scaled_floats(size);
  Tile tiles[kWkv7Heads][kTiles];
  int count = 0;
  for (int64_t at = first; at < size && count < kTiles; at += kTileWidth, ++count) {
    for (int64_t h = 0; h < many; ++h, memory += tile_floats(size)) fill(heads[h], at, memory, tiles[h][count]);
  }
  for (int64_t from = 0; from < tokens; from += kShared) {
    const int64_t to = from + kShared < tokens ? from + kShared : tokens;
    for (int64_t h = 0; h < many; ++h) {
      for (int64_t t = from, together; t < to; t += together > 0 ? together : 1) {
        together = share(heads[h], t, to, scratch, product);
        for (int i = 0; i < count; ++i) {
          if (together > 0) {
            shared(heads[h], t, together, scratch, product, tiles[h][i]);
          } else {
            plain(heads[h], t, tiles[h][i]);
          }
        }
      }
    }
  }
  for (int64_t h = 0; h < many; ++h) {
    for (int i = 0; i < count; ++i) finish(heads[h], tiles[h][i]);
  }
}

void run(const Wkv7Head* heads, int64_t count, float* scratch) {
  const int64_t size = heads[0].size;
  if (heads[0].tokens < kColumnsFrom) {
    for (int64_t h = 0; h < count; ++h) size == 64 ? rows<64>(heads[h]) : rows<0>(heads[h]);
  } else {
    for (int64_t first = 0; first < size; first += kTiles * kTileWidth) columns(heads, count, first, scratch);
  }
}

int64_t scratch_size(int64_t size) { return scaled_floats(size) + kWkv7Heads * kTiles * tile_floats(size); }

}  // namespace

const Wkv7Loops wkv7_loops = {run, scratch_size};

}  // namespace xexport::XEXPORT_ISA
