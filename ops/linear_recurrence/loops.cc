// The gated linear recurrence of one head, with values in the lanes:
//   S[k,v] = exp(g[k]) S[k,v] + k[k] v[v]        out[v] = scale sum_k q[k] S[k,v]
// The state lies in memory as it is needed, and a column of it evolves by itself: a tile of columns stays in
// the cache over some tokens, whose exponentials and scaled q are made once for all tiles.
#include "loops.h"

#include "../native/exp.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int kTile = 4;         // vectors of values at a time
constexpr int64_t kTokens = 16;  // tokens at a time

int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

XEXPORT_INLINE Vec load_some(const float* p, int64_t n) { return n >= kLanes ? load(p) : load_part(p, n); }

// exp(g) and scale q of `count` tokens: [count][2][padded(keys)].
void prepare(const LinearHead& x, int64_t first, int64_t count, float* to) {
  const int64_t room = padded(x.keys);
  for (int64_t t = first; t < first + count; ++t, to += 2 * room) {
    const float *g = x.decay + t * x.decay_stride, *q = x.q + t * x.key_stride;
    const Vec same = x.decay_a_key ? Vec{} : exp2_any(all(g[0]) * all(kLog2E));
    for (int64_t j = 0; j < x.keys; j += kLanes) {
      const int64_t left = x.keys - j;
      store(to + j, x.decay_a_key ? exp2_any(load_some(g + j, left) * all(kLog2E)) : same);
      store(to + room + j, load_some(q + j, left) * all(x.scale));
    }
  }
}

// Asks for this tile's part of a token to come: its rows lie in other pages, which no prefetcher guesses.
XEXPORT_INLINE void prefetch(const LinearHead& x, int64_t t, int64_t first) {
  if (t >= x.tokens) return;
  __builtin_prefetch(x.v + t * x.value_stride + first);
  __builtin_prefetch(x.out + t * x.value_stride + first, 1);
  if (first >= x.keys) return;
  __builtin_prefetch(x.q + t * x.key_stride + first);
  __builtin_prefetch(x.k + t * x.key_stride + first);
  if (x.decay_a_key) __builtin_prefetch(x.decay + t * x.decay_stride + first);
}

// Count vectors of values from `first`. Part: of the one vector only `width` lanes.
template <int Count, bool Part>
void columns(const LinearHead& x, const float* prepared, int64_t begin, int64_t count, int64_t first, int64_t width) {
  const int64_t room = padded(x.keys);
  const float* from = (begin == 0 ? x.state : x.new_state) + first;
  float* to = x.new_state + first;
  for (int64_t t = begin; t < begin + count; ++t, prepared += 2 * room) {
    const float *w = prepared, *q = prepared + room, *k = x.k + t * x.key_stride;
    const float* v = x.v + t * x.value_stride + first;
    for (int i = 0; i < Count; i += 64 / kBytes) prefetch(x, t + kTokens, first + i * kLanes);
    Vec value[Count], read[Count] = {};
    for (int i = 0; i < Count; ++i) value[i] = Part ? load_part(v, width) : load(v + i * kLanes);
    for (int64_t j = 0; j < x.keys; ++j) {
      const Vec wj = all(w[j]), kj = all(k[j]), qj = all(q[j]);
#pragma GCC unroll 4
      for (int i = 0; i < Count; ++i) {
        const int64_t cell = j * x.values + i * kLanes;
        const Vec s = wj * (Part ? load_part(from + cell, width) : load(from + cell)) + kj * value[i];
        read[i] += qj * s;
        if (Part) {
          store_part(to + cell, s, width);
        } else {
          store(to + cell, s);
        }
      }
    }
    float* out = x.out + t * x.value_stride + first;
    for (int i = 0; i < Count; ++i) {
      if (Part) {
        store_part(out, read[i], width);
      } else {
        store(out + i * kLanes, read[i]);
      }
    }
    from = to;
  }
}

void head(const LinearHead& x, float* prepared) {
  for (int64_t t = 0; t < x.tokens; t += kTokens) {
    const int64_t count = t + kTokens < x.tokens ? kTokens : x.tokens - t;
    prepare(x, t, count, prepared);
    int64_t first = 0;
    for (; first + kTile * kLanes <= x.values; first += kTile * kLanes) {
      columns<kTile, false>(x, prepared, t, count, first, 0);
    }
    for (; first + kLanes <= x.values; first += kLanes) columns<1, false>(x, prepared, t, count, first, 0);
    if (first < x.values) columns<1, true>(x, prepared, t, count, first, x.values - first);
  }
}

int64_t scratch_size(int64_t keys) { return 2 * kTokens * padded(keys); }

}  // namespace

const LinearLoops linear_recurrence_loops = {head, scratch_size};

}  // namespace xexport::XEXPORT_ISA
