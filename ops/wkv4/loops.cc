// RWKV-4's recurrence with channels in the lanes and the state in registers over all tokens.
//
//   y = (A + e^(u + k) v) / (B + e^(u + k))      A' = e^w A + e^k v      B' = e^w B + e^k
//
// A = aa e^pp and B = bb e^pp. Of the two weights e^(a - max(a, b)) and e^(b - max(a, b)) the larger is 1 and
// the other e^-|a - b|: one exponential. That is not what the reference computes where a - b is infinite or
// NaN, so such tokens take its way, lane by lane.
#include "loops.h"

#include "../native/exp.h"

extern "C" float expf(float);

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int kAtOnce = 2;  // vectors of channels whose chains of dependent operations overlap
constexpr int64_t kAhead = 6;  // tokens
// Powers of two below 2^kLeast are denormal in float32, below 2^kZero they are 0.
constexpr float kLeast = -125.0f, kZero = -150.0f;

struct State {
  Vec aa, bb, pp;
};

// Where a - b is neither infinite nor NaN.
XEXPORT_INLINE IntVec is_finite(Vec d) { return (d - d) == Vec{}; }

// The logarithm of the smaller weight to base 2; d is the difference of the exponents.
XEXPORT_INLINE Vec smaller(Vec d) { return (d < Vec{} ? d : -d) * all(kLog2E); }

// s joined by a value v with the exponent `other`; less is 2^smaller(d), d = s.pp - other.
XEXPORT_INLINE State joined(const State& s, Vec d, Vec less, Vec other, Vec v) {
  const Vec one = all(1.0f);
  const IntVec keeps = d >= Vec{};
  const Vec old = keeps ? one : less, added = keeps ? less : one;
  return {old * s.aa + added * v, old * s.bb + added, keeps ? s.pp : other};
}

// One token as the reference has it: for exponents that are infinite or NaN.
__attribute__((noinline, cold)) void careful(State& s, Vec w, Vec bonus, Vec k, Vec v, Vec& y) {
  for (int i = 0; i < kLanes; ++i) {
    auto larger = [](float a, float b) { return a != a || b != b ? a + b : a > b ? a : b; };
    float most = larger(s.pp[i], bonus[i]);
    float old = expf(s.pp[i] - most), added = expf(bonus[i] - most);
    y[i] = (old * s.aa[i] + added * v[i]) / (old * s.bb[i] + added);
    const float faded = s.pp[i] + w[i];
    most = larger(faded, k[i]);
    old = expf(faded - most);
    added = expf(k[i] - most);
    s.aa[i] = old * s.aa[i] + added * v[i];
    s.bb[i] = old * s.bb[i] + added;
    s.pp[i] = most;
  }
}

// One token of Count vectors of channels: their exponentials side by side.
template <int Count>
XEXPORT_INLINE void token(State* s, const Vec* w, const Vec* u, const Vec* k, const Vec* v, Vec* y) {
  Vec now[Count], next[Count], z[2 * Count], power[2 * Count];
  IntVec finite = IntVec{} - 1;
#pragma GCC unroll 4
  for (int q = 0; q < Count; ++q) {
    now[q] = s[q].pp - (u[q] + k[q]);
    next[q] = s[q].pp + w[q] - k[q];
    finite &= is_finite(now[q]) & is_finite(next[q]);
    z[q] = smaller(now[q]);
    z[Count + q] = smaller(next[q]);
  }
  if (!in_every_lane(finite)) {
    for (int q = 0; q < Count; ++q) {
      State copy = s[q];  // whose address is taken, so that the states themselves can stay in registers
      Vec read = {};
      careful(copy, w[q], u[q] + k[q], k[q], v[q], read);
      s[q] = copy;
      y[q] = read;
    }
    return;
  }
  // 2^-125 for what would be a denormal number; 0 where the reference has 0
#pragma GCC unroll 8
  for (int i = 0; i < 2 * Count; ++i) power[i] = z[i] < all(kLeast) ? all(kLeast) : z[i];
  exp2_normal<2 * Count>(power);
#pragma GCC unroll 4
  for (int q = 0; q < Count; ++q) {
    const Vec read = z[q] < all(kZero) ? Vec{} : power[q];
    const Vec kept = z[Count + q] < all(kZero) ? Vec{} : power[Count + q];
    const State with = joined(s[q], now[q], read, u[q] + k[q], v[q]);
    y[q] = with.aa / with.bb;
    s[q] = joined({s[q].aa, s[q].bb, s[q].pp + w[q]}, next[q], kept, k[q], v[q]);
  }
}

// Count vectors of channels from `first`.
template <int Count>
void whole(const Wkv4& sequence, int64_t first) {
  const Wkv4 x = sequence;  // what is stored might be its sizes, for all the compiler knows
  State s[Count];
  Vec w[Count], u[Count], k[Count], v[Count], y[Count];
  for (int q = 0; q < Count; ++q) {
    const int64_t at = first + q * kLanes;
    s[q] = {load(x.state[0] + at), load(x.state[1] + at), load(x.state[2] + at)};
    w[q] = load(x.w + at);
    u[q] = load(x.u + at);
  }
  for (int64_t t = 0; t < x.tokens; ++t) {
    const int64_t at = t * x.channels + first;
    if (t + kAhead < x.tokens) {  // other channels lie between the rows of two tokens
      __builtin_prefetch(x.k + at + kAhead * x.channels);
      __builtin_prefetch(x.v + at + kAhead * x.channels);
      __builtin_prefetch(x.y + at + kAhead * x.channels, 1);
    }
#pragma GCC unroll 4
    for (int q = 0; q < Count; ++q) {
      k[q] = load(x.k + at + q * kLanes);
      v[q] = load(x.v + at + q * kLanes);
    }
    token<Count>(s, w, u, k, v, y);
#pragma GCC unroll 4
    for (int q = 0; q < Count; ++q) store(x.y + at + q * kLanes, y[q]);
  }
  for (int q = 0; q < Count; ++q) {
    const int64_t at = first + q * kLanes;
    store(x.new_state[0] + at, s[q].aa);
    store(x.new_state[1] + at, s[q].bb);
    store(x.new_state[2] + at, s[q].pp);
  }
}

// `width` < kLanes channels from `first`; the lanes behind hold zeros that nobody reads.
void part(const Wkv4& x, int64_t first, int64_t width) {
  State s = {load_part(x.state[0] + first, width), load_part(x.state[1] + first, width),
             load_part(x.state[2] + first, width)};
  const Vec w = load_part(x.w + first, width), u = load_part(x.u + first, width);
  for (int64_t t = 0; t < x.tokens; ++t) {
    const int64_t at = t * x.channels + first;
    const Vec k = load_part(x.k + at, width), v = load_part(x.v + at, width);
    Vec y = {};
    token<1>(&s, &w, &u, &k, &v, &y);
    store_part(x.y + at, y, width);
  }
  store_part(x.new_state[0] + first, s.aa, width);
  store_part(x.new_state[1] + first, s.bb, width);
  store_part(x.new_state[2] + first, s.pp, width);
}

void run(const Wkv4& x, int64_t first, int64_t last) {
  for (; first + kAtOnce * kLanes <= last; first += kAtOnce * kLanes) whole<kAtOnce>(x, first);
  for (; first + kLanes <= last; first += kLanes) whole<1>(x, first);
  if (first < last) part(x, first, last - first);
}

}  // namespace

const Wkv4Loops wkv4_loops = {run};

}  // namespace xexport::XEXPORT_ISA
