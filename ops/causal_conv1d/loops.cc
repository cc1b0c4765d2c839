// A short convolution with the channels in the lanes: every tap is a product of two contiguous rows. Some
// outputs in a row are made at once, which read a tap's weights once and share most of their inputs.
#include "loops.h"

#include "../native/exp.h"
#include "../native/simd.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int kAtOnce = 4;  // outputs

XEXPORT_INLINE Vec silu(Vec v) { return v / (all(1.0f) + exp2_any(v * all(-kLog2E))); }

const float* row(const ShortConvolution& c, int64_t t) {
  return t >= 0 ? c.x + t * c.channels : c.state + (c.taps - 1 + t) * c.channels;
}

// One vector of channels of outputs t .. t + Rows - 1; Taps is 0 if it is known at run time only.
template <int Taps, int Rows, bool Whole>
XEXPORT_INLINE void vector(const ShortConvolution& c, const float* const* past, int64_t t, int64_t channel) {
  const int64_t taps = Taps > 0 ? Taps : c.taps, count = c.channels - channel;
  const auto at = [=](const float* p) { return Whole ? load(p + channel) : load_part(p + channel, count); };
  Vec y[Rows];
  for (int r = 0; r < Rows; ++r) y[r] = at(c.bias);
#pragma GCC unroll 4
  for (int64_t k = 0; k < taps; ++k) {
    const Vec w = at(c.weight + k * c.channels);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) y[r] += w * at(Taps > 0 ? past[k + r] : row(c, t + r + k - taps + 1));
  }
  for (int r = 0; r < Rows; ++r) {
    if (c.silu) y[r] = silu(y[r]);
    float* to = c.y + (t + r) * c.channels + channel;
    Whole ? store(to, y[r]) : store_part(to, y[r], count);
  }
}

template <int Taps, int Rows>
void rows(const ShortConvolution& c, int64_t t) {
  const float* past[Taps + Rows];
  if constexpr (Taps > 0) {
    for (int i = 0; i < Taps - 1 + Rows; ++i) past[i] = row(c, t + i - (Taps - 1));
  }
  int64_t channel = 0;
  for (; channel + kLanes <= c.channels; channel += kLanes) vector<Taps, Rows, true>(c, past, t, channel);
  if (channel < c.channels) vector<Taps, Rows, false>(c, past, t, channel);
}

template <int Taps>
void all_rows(const ShortConvolution& c, int64_t begin, int64_t end) {
  int64_t t = begin;
  for (; t + kAtOnce <= end; t += kAtOnce) rows<Taps, kAtOnce>(c, t);
  for (; t < end; ++t) rows<Taps, 1>(c, t);
}

void run(const ShortConvolution& c, int64_t begin, int64_t end) {
  switch (c.taps) {
    case 3: return all_rows<3>(c, begin, end);
    case 4: return all_rows<4>(c, begin, end);
    default: return all_rows<0>(c, begin, end);
  }
}

}  // namespace

const ShortConvolutionLoops short_convolution_loops = {run};

}  // namespace xexport::XEXPORT_ISA
