// Tokens by channels to channels by tokens and back, gated on the way, in tiles that are turned in registers. A
// cache line of a row is filled or read at once, as rows may lie a power of two apart, where few lines fit the
// cache.
#include "loops.h"

#include "../native/simd.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int64_t kLine = 16;  // floats
static_assert(kLine % kLanes == 0);

struct Gates {
  const float *x0, *x1, *v;
};
XEXPORT_INLINE Gates gates(const GatedChannels& x, int64_t t, int64_t c) {
  const float* p = x.packed + t * 3 * x.width + c;
  return {p, p + x.width, p + 2 * x.width};
}

void enter_tile(const GatedChannels& x, int64_t t, int64_t c) {
  Vec tile[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const Gates g = gates(x, t + i, c);
    tile[i] = load(g.x1) * load(g.v);
  }
  transpose(tile);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(x.cache + (c + i) * x.cache_stride + t, tile[i]);
}

void leave_tile(const GatedChannels& x, int64_t t, int64_t c) {
  Vec tile[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) tile[i] = load(x.convolved + (c + i) * x.convolved_stride + t);
  transpose(tile);
  const Vec skip = load(x.skip + c);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const Gates g = gates(x, t + i, c);
    store(x.y + (t + i) * x.width + c, load(g.x0) * (tile[i] + skip * (load(g.x1) * load(g.v))));
  }
}

void enter_some(const GatedChannels& x, int64_t t, int64_t end, int64_t first) {
  for (; t < end; ++t) {
    for (int64_t c = first; c < x.channels; ++c) {
      const Gates g = gates(x, t, c);
      x.cache[c * x.cache_stride + t] = *g.x1 * *g.v;
    }
  }
}

void leave_some(const GatedChannels& x, int64_t t, int64_t end, int64_t first) {
  for (; t < end; ++t) {
    for (int64_t c = first; c < x.channels; ++c) {
      const Gates g = gates(x, t, c);
      x.y[t * x.width + c] = *g.x0 * (x.convolved[c * x.convolved_stride + t] + x.skip[c] * (*g.x1 * *g.v));
    }
  }
}

template <void (*Tile)(const GatedChannels&, int64_t, int64_t),
          void (*Some)(const GatedChannels&, int64_t, int64_t, int64_t)>
void all_tiles(const GatedChannels& x) {
  const int64_t whole = x.channels / kLine * kLine, length = x.tokens / kLine * kLine;
  for (int64_t c = 0; c < whole; c += kLine) {
    for (int64_t t = 0; t < length; t += kLine) {
      for (int64_t half = 0; half < kLine; half += kLanes) {
        for (int64_t part = 0; part < kLine; part += kLanes) Tile(x, t + part, c + half);
      }
    }
  }
  Some(x, 0, length, whole);
  Some(x, length, x.tokens, 0);
}

void enter(const GatedChannels& x) { all_tiles<enter_tile, enter_some>(x); }
void leave(const GatedChannels& x) { all_tiles<leave_tile, leave_some>(x); }

}  // namespace

const GateLoops gate_loops = {enter, leave};

}  // namespace xexport::XEXPORT_ISA
