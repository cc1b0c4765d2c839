// The gates of hyena_conv, in one version per instruction set.
#pragma once

#include <cstdint>

#include "../native/isa.h"

namespace xexport {

// Some channels of one sequence. Rows of `packed` are tokens and hold x0, x1 and v, `width` floats each; rows of
// `cache` and `convolved` are channels.
struct GatedChannels {
  const float* packed;  // [tokens, 3 * width], from the first channel's x0 on
  const float* skip;    // [channels]
  float* cache;         // [channels, cache_stride], from the chunk's first token on
  const float* convolved;
  float* y;             // [tokens, width]
  int64_t width, tokens, channels, cache_stride, convolved_stride;
};

struct GateLoops {
  void (*enter)(const GatedChannels& x);  // cache = x1 * v
  void (*leave)(const GatedChannels& x);  // y = x0 * (convolved + skip * x1 * v)
};

XEXPORT_DECLARE_LOOPS(GateLoops, gate_loops)

}  // namespace xexport
