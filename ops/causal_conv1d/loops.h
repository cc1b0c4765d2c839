// The inner loops of causal_conv1d, in one version per instruction set.
#pragma once

#include <cstdint>

#include "../native/isa.h"

namespace xexport {

// Rows of one sequence: `channels` floats each. Row t of the past is x[t] for t >= 0, else state[taps - 1 + t].
struct ShortConvolution {
  const float *x, *weight, *bias, *state;  // [T, D], [taps, D], [D], [taps - 1, D]
  float* y;                                // [T, D]
  int64_t channels, taps;
  bool silu;
};

struct ShortConvolutionLoops {
  // outputs begin .. end - 1
  void (*run)(const ShortConvolution& conv, int64_t begin, int64_t end);
};

XEXPORT_DECLARE_LOOPS(ShortConvolutionLoops, short_convolution_loops)

}  // namespace xexport
