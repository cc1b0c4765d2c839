// The gated linear recurrence of one head, with values in the lanes:
//   S[k,v] = exp(g[k]) S[k,v] + k[k] v[v]        out[v] = scale sum_k q[k] S[k,v]
// The state lies in memory as it is needed, and a column of it evolves by itself: a tile of columns stays in
// the cache over some tokens, whose exponentials and scaled q are made once for all tiles.
//
// With one decay a head some tokens at a time are products of matrices (RetNet's equation 7, Mamba-2's section 6),
// which read and write the state once instead of once a token:
//   out_t = scale (exp(G_t) q_t S + sum_{s<=t} exp(G_t - G_s) (q_t.k_s) v_s),   G_t = g_1 + .. + g_t
//   S' = exp(G_n) S + sum_s exp(G_n - G_s) k_s v_s^T
// Sums of decays and their differences are in double: -1000 and a difference of 0.001 may be in one chunk.
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

constexpr int64_t kChunk = 32;  // tokens of a chunk
constexpr int64_t kLeast = 8;   // with fewer tokens, or keys, the loop is as fast
constexpr int64_t kWide = 128;
constexpr int64_t kStrip = 2 * kLanes;
constexpr int kTall = 4;

// What the chunks of a head use of the scratch.
struct Chunk {
  float* q;       // [kChunk, keys], scaled
  float* turned;  // [keys, kChunk], k
  float* shares;  // [kChunk, kChunk]
  float* state;   // [keys, kStrip], a strip
  float* value;   // [kChunk, kStrip]
  Chunk(float* scratch, int64_t keys)
      : q(scratch),
        turned(q + kChunk * keys),
        shares(turned + kChunk * keys),
        state(shares + kChunk * kChunk),
        value(state + keys * kStrip) {}
};

// sums[r] += sum_n a[r, n] b[n, 0 .. kStrip)
template <int Rows>
XEXPORT_INLINE void add_product(const float* a, int64_t a_stride, const float* b, int64_t depth, Vec (*sums)[2]) {
  for (int64_t n = 0; n < depth; ++n) {
    const Vec x = load(b + n * kStrip), y = load(b + n * kStrip + kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Vec c = all(a[r * a_stride + n]);
      sums[r][0] += c * x;
      sums[r][1] += c * y;
    }
  }
}

template <int Rows>
XEXPORT_INLINE void store_rows(float* to, int64_t stride, const Vec (*sums)[2]) {
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    store(to + r * stride, sums[r][0]);
    store(to + r * stride + kLanes, sums[r][1]);
  }
}

// Rows t .. of a strip of out: what the state gives, and the chunk's tokens up to them.
template <int Rows>
XEXPORT_INLINE void out_rows(const LinearHead& x, const Chunk& c, int64_t t, float* out) {
  Vec sums[Rows][2] = {};
  add_product<Rows>(c.q + t * x.keys, x.keys, c.state, x.keys, sums);
  add_product<Rows>(c.shares + t * kChunk, kChunk, c.value, t + Rows, sums);
  store_rows<Rows>(out + t * x.value_stride, x.value_stride, sums);
}

// Rows j .. of a strip of the new state.
template <int Rows>
XEXPORT_INLINE void state_rows(const LinearHead& x, const Chunk& c, int64_t j, int64_t count, float kept, float* to) {
  Vec sums[Rows][2];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    for (int i = 0; i < 2; ++i) sums[r][i] = load(c.state + (j + r) * kStrip + i * kLanes) * all(kept);
  }
  add_product<Rows>(c.turned + j * kChunk, kChunk, c.value, count, sums);
  store_rows<Rows>(to + j * x.values, x.values, sums);
}

// Rows t .. of the chunk's matrix (q K^T), a strip of its columns.
template <int Rows>
XEXPORT_INLINE void score_rows(const LinearHead& x, const Chunk& c, int64_t t, int64_t first) {
  Vec sums[Rows][2] = {};
  const float* b = c.turned + first;
  for (int64_t n = 0; n < x.keys; ++n) {
    const Vec low = load(b + n * kChunk), high = load(b + n * kChunk + kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Vec a = all(c.q[(t + r) * x.keys + n]);
      sums[r][0] += a * low;
      sums[r][1] += a * high;
    }
  }
  store_rows<Rows>(c.shares + t * kChunk + first, kChunk, sums);
}

// e^sums[s], which are 0 or below; kChunk of them.
XEXPORT_INLINE void exponentials(const float* sums, float* to) {
  for (int64_t s = 0; s < kChunk; s += kLanes) store(to + s, exp2_any(load(sums + s) * all(kLog2E)));
}

// `count` tokens from `begin` on, at most kChunk.
void chunk(const LinearHead& x, int64_t begin, int64_t count, float* scratch) {
  const Chunk c(scratch, x.keys);
  double sum[kChunk];
  double so_far = 0;
  for (int64_t t = 0; t < count; ++t) sum[t] = so_far += static_cast<double>(x.decay[(begin + t) * x.decay_stride]);
  const float* k = x.k + begin * x.key_stride;
  if (count < kChunk) std::memset(c.turned, 0, sizeof(float) * static_cast<size_t>(kChunk * x.keys));
  transpose(k, x.key_stride, count, x.keys, c.turned, kChunk);
  for (int64_t t = 0; t < count; ++t) {
    const float* q = x.q + (begin + t) * x.key_stride;
    for (int64_t j = 0; j < x.keys; ++j) c.q[t * x.keys + j] = q[j] * x.scale;
  }
  alignas(kBytes) float lag[kChunk] = {}, factor[kChunk];
  const int64_t fours = count / kTall * kTall;
  for (int64_t first = 0; first < count; first += kStrip) {
    for (int64_t t = first / kTall * kTall; t < fours; t += kTall) score_rows<kTall>(x, c, t, first);
    for (int64_t t = fours; t < count; ++t) score_rows<1>(x, c, t, first);
  }
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t s = 0; s <= t; ++s) lag[s] = static_cast<float>(sum[t] - sum[s]);
    exponentials(lag, factor);
    float* shares = c.shares + t * kChunk;
    for (int64_t s = 0; s < kChunk; ++s) shares[s] = s <= t ? shares[s] * factor[s] : 0.0f;
  }
  for (int64_t t = 0; t < kChunk; ++t) lag[t] = t < count ? static_cast<float>(sum[t]) : 0.0f;
  exponentials(lag, factor);
  const float kept = factor[count - 1];
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t j = 0; j < x.keys; ++j) c.q[t * x.keys + j] *= factor[t];
  }
  for (int64_t t = 0; t < count; ++t) lag[t] = static_cast<float>(sum[count - 1] - sum[t]);
  exponentials(lag, factor);
  for (int64_t j = 0; j < x.keys; ++j) {
    for (int64_t t = 0; t < kChunk; t += kLanes) {
      store(c.turned + j * kChunk + t, load(c.turned + j * kChunk + t) * load(factor + t));
    }
  }
  const float* from = begin == 0 ? x.state : x.new_state;
  const int64_t key_fours = x.keys / kTall * kTall;
  for (int64_t first = 0; first < x.values; first += kStrip) {
    for (int64_t j = 0; j < x.keys; ++j) {
      store(c.state + j * kStrip, load(from + j * x.values + first));
      store(c.state + j * kStrip + kLanes, load(from + j * x.values + first + kLanes));
    }
    for (int64_t t = 0; t < count; ++t) {
      const float* v = x.v + (begin + t) * x.value_stride + first;
      store(c.value + t * kStrip, load(v));
      store(c.value + t * kStrip + kLanes, load(v + kLanes));
    }
    float* out = x.out + begin * x.value_stride + first;
    for (int64_t t = 0; t < fours; t += kTall) out_rows<kTall>(x, c, t, out);
    for (int64_t t = fours; t < count; ++t) out_rows<1>(x, c, t, out);
    float* to = x.new_state + first;
    for (int64_t j = 0; j < key_fours; j += kTall) state_rows<kTall>(x, c, j, count, kept, to);
    for (int64_t j = key_fours; j < x.keys; ++j) state_rows<1>(x, c, j, count, kept, to);
  }
}

// Whether all numbers lie in low .. high; not so for a NaN.
bool within(const float* p, int64_t count, float low, float high) {
  IntVec inside = ~IntVec{};
  const Vec least = all(low), most = all(high);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Vec x = load(p + i);
    inside &= (x >= least) & (x <= most);
  }
  for (; i < count; ++i) {
    if (!(p[i] >= low && p[i] <= high)) return false;
  }
  return in_every_lane(inside);
}

// Whether no product of a chunk can overflow, and nothing is infinite or NaN: such a number must not get to
// tokens before it, and a product with a zero of the matrix would take it there.
bool ordinary(const LinearHead& x, int64_t begin, int64_t count) {
  constexpr float kMost = 1e8f;
  for (int64_t t = begin; t < begin + count; ++t) {
    if (!within(x.q + t * x.key_stride, x.keys, -kMost, kMost) ||
        !within(x.k + t * x.key_stride, x.keys, -kMost, kMost) ||
        !within(x.v + t * x.value_stride, x.values, -kMost, kMost) ||
        !within(x.decay + t * x.decay_stride, 1, -kMost, 0)) {
      return false;
    }
  }
  return within(begin == 0 ? x.state : x.new_state, x.keys * x.values, -1e20f, 1e20f);
}

void head(const LinearHead& x, float* prepared) {
  const bool products = !x.decay_a_key && x.values % kStrip == 0 && x.keys >= kWide;
  for (int64_t t = 0; t < x.tokens;) {
    const int64_t left = x.tokens - t;
    if (products && left >= kLeast) {
      const int64_t some = left < kChunk ? left : kChunk;
      if (ordinary(x, t, some)) {
        chunk(x, t, some, prepared);
        t += some;
        continue;
      }
    }
    const int64_t count = kTokens < left ? kTokens : left;
    prepare(x, t, count, prepared);
    int64_t first = 0;
    for (; first + kTile * kLanes <= x.values; first += kTile * kLanes) {
      columns<kTile, false>(x, prepared, t, count, first, 0);
    }
    for (; first + kLanes <= x.values; first += kLanes) columns<1, false>(x, prepared, t, count, first, 0);
    if (first < x.values) columns<1, true>(x, prepared, t, count, first, x.values - first);
    t += count;
  }
}

int64_t scratch_size(int64_t keys) {
  return 2 * kChunk * padded(keys) + kChunk * kChunk + (keys + kChunk) * kStrip;
}

}  // namespace

const LinearLoops linear_recurrence_loops = {head, scratch_size};

}  // namespace xexport::XEXPORT_ISA
