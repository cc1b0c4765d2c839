// The recurrence of RWKV-5 and 6 for one head, with value channels in the lanes:
//   y[v] = sum_k r[k] S[k,v] + <r u, k> v[v]        S[k,v] = w[k] S[k,v] + k[k] v[v]
// A tile of value channels stays in the cache over all tokens; column v of the state evolves by itself.
#include "loops.h"

#include "../native/simd.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int kTile = 4;        // vectors of value channels at a time
constexpr int64_t kAhead = 3;  // tokens

// <r u, k> of one token.
XEXPORT_INLINE float bonus(const float* r, const float* u, const float* k, int64_t size) {
  Vec sum = {};
  int64_t j = 0;
  for (; j + kLanes <= size; j += kLanes) sum += load(r + j) * load(u + j) * load(k + j);
  if (j < size) sum += load_part(r + j, size - j) * load_part(u + j, size - j) * load_part(k + j, size - j);
  return xexport::XEXPORT_ISA::sum(sum);
}

// The rows that token t needs: other heads lie between them and those of the token before.
XEXPORT_INLINE void prefetch(const Wkv6Head& x, int64_t t) {
  constexpr int64_t kLine = 16;
  for (int64_t j = 0; j < x.size; j += kLine) {
    __builtin_prefetch(x.r + t * x.key_stride + j);
    __builtin_prefetch(x.k + t * x.key_stride + j);
    __builtin_prefetch(x.w + t * x.decay_stride + j);
  }
}

// Count vectors of value channels from `first`, all tokens.
template <int Count>
void columns(const Wkv6Head& head, int64_t first) {
  const Wkv6Head x = head;  // what is stored might be its sizes, for all the compiler knows
  const float* from = x.state + first;
  for (int64_t t = 0; t < x.tokens; ++t) {
    const float *r = x.r + t * x.key_stride, *k = x.k + t * x.key_stride, *w = x.w + t * x.decay_stride;
    const float* v = x.v + t * x.value_stride + first;
    float* y = x.y + t * x.value_stride + first;
    if (t + kAhead < x.tokens) {
      prefetch(x, t + kAhead);
      __builtin_prefetch(v + kAhead * x.value_stride);
      __builtin_prefetch(v + kAhead * x.value_stride + Count * kLanes - 1);
      __builtin_prefetch(y + kAhead * x.value_stride, 1);
      __builtin_prefetch(y + kAhead * x.value_stride + Count * kLanes - 1, 1);
    }
    const Vec own = all(bonus(r, x.u, k, x.size));
    Vec value[Count], read[Count];
    for (int q = 0; q < Count; ++q) {
      value[q] = load(v + q * kLanes);
      read[q] = own * value[q];
    }
    const float* cell = from;
    float* to = x.new_state + first;
    for (int64_t j = 0; j < x.size; ++j, cell += x.width, to += x.width) {
      const Vec rj = all(r[j]), kj = all(k[j]), wj = all(w[j]);
#pragma GCC unroll 4
      for (int q = 0; q < Count; ++q) {
        const Vec s = load(cell + q * kLanes);
        read[q] += rj * s;
        store(to + q * kLanes, wj * s + kj * value[q]);
      }
    }
    for (int q = 0; q < Count; ++q) store(y + q * kLanes, read[q]);
    from = x.new_state + first;
  }
}

// `count` < kLanes value channels from `first`.
void part(const Wkv6Head& x, int64_t first, int64_t count) {
  const float* from = x.state + first;
  float* to = x.new_state + first;
  for (int64_t t = 0; t < x.tokens; ++t) {
    const float *r = x.r + t * x.key_stride, *k = x.k + t * x.key_stride, *w = x.w + t * x.decay_stride;
    const Vec value = load_part(x.v + t * x.value_stride + first, count);
    Vec read = all(bonus(r, x.u, k, x.size)) * value;
    for (int64_t j = 0; j < x.size; ++j) {
      const Vec s = load_part(from + j * x.width, count);
      read += all(r[j]) * s;
      store_part(to + j * x.width, all(w[j]) * s + all(k[j]) * value, count);
    }
    store_part(x.y + t * x.value_stride + first, read, count);
    from = to;
  }
}

void head(const Wkv6Head& x) {
  int64_t first = 0;
  for (; first + kTile * kLanes <= x.width; first += kTile * kLanes) columns<kTile>(x, first);
  for (; first + kLanes <= x.width; first += kLanes) columns<1>(x, first);
  if (first < x.width) part(x, first, x.width - first);
}

}  // namespace

const Wkv6Loops wkv6_loops = {head};

}  // namespace xexport::XEXPORT_ISA
