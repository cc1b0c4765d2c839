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

struct State {
  Vec aa, bb, pp;
};

// Where a - b is neither infinite nor NaN.
XEXPORT_INLINE IntVec is_finite(Vec d) { return (d - d) == Vec{}; }

XEXPORT_INLINE Vec absolute(Vec x) { return x < Vec{} ? -x : x; }

// s joined by a value v with the exponent `other`; d = s.pp - other is finite.
XEXPORT_INLINE State joined(const State& s, Vec d, Vec other, Vec v) {
  const Vec less = exp2_any(absolute(d) * all(-kLog2E)), one = all(1.0f);
  const IntVec keeps = d >= Vec{};
  const Vec old = keeps ? one : less, added = keeps ? less : one;
  return {old * s.aa + added * v, old * s.bb + added, keeps ? s.pp : other};
}

// One token as the reference has it: for exponents that are infinite or NaN.
void careful(State& s, Vec w, Vec bonus, Vec k, Vec v, Vec& y) {
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

XEXPORT_INLINE Vec token(State& s, Vec w, Vec u, Vec k, Vec v) {
  const Vec bonus = u + k, faded = s.pp + w;
  const Vec now = s.pp - bonus, next = faded - k;
  Vec y = {};
  if (in_every_lane(is_finite(now) & is_finite(next))) {
    const State read = joined(s, now, bonus, v);
    y = read.aa / read.bb;
    s = joined({s.aa, s.bb, faded}, next, k, v);
  } else {
    careful(s, w, bonus, k, v, y);
  }
  return y;
}

// Count vectors of channels from `first`.
template <int Count>
void whole(const Wkv4& x, int64_t first) {
  State s[Count];
  Vec w[Count], u[Count];
  for (int q = 0; q < Count; ++q) {
    const int64_t at = first + q * kLanes;
    s[q] = {load(x.state[0] + at), load(x.state[1] + at), load(x.state[2] + at)};
    w[q] = load(x.w + at);
    u[q] = load(x.u + at);
  }
  for (int64_t t = 0; t < x.tokens; ++t) {
    for (int q = 0; q < Count; ++q) {
      const int64_t at = t * x.channels + first + q * kLanes;
      store(x.y + at, token(s[q], w[q], u[q], load(x.k + at), load(x.v + at)));
    }
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
    const Vec y = token(s, w, u, load_part(x.k + at, width), load_part(x.v + at, width));
    store_part(x.y + at, y, width);
  }
  store_part(x.new_state[0] + first, s.aa, width);
  store_part(x.new_state[1] + first, s.bb, width);
  store_part(x.new_state[2] + first, s.pp, width);
}

void run(const Wkv4& x, int64_t first, int64_t last) {
  for (; first + 2 * kLanes <= last; first += 2 * kLanes) whole<2>(x, first);
  for (; first + kLanes <= last; first += kLanes) whole<1>(x, first);
  if (first < last) part(x, first, last - first);
}

}  // namespace

const Wkv4Loops wkv4_loops = {run};

}  // namespace xexport::XEXPORT_ISA
