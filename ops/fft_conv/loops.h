// The inner loops of causal long convolutions, in one version per instruction set.
#pragma once

#include <cstdint>

#include "../native/isa.h"

namespace xexport {

// Tables of one transform; see plan.h.
struct PlanTables {
  int64_t size;           // points, first * 2^k
  int first;              // 1, 3 or 5
  const float* twist;     // [size, 2]
  const float* odd;       // [size / first, first - 1, 2]
  const float* const* levels;
};

// Channels of one lane group: as many rows as there are lanes, or fewer.
struct FilterRows {
  const float* h;
  int64_t stride, taps, rows;
};
struct SignalRows {
  const float* u;
  int64_t u_stride, points, rows;  // points 0 .. points - 1 are convolved
  float* y;
  int64_t y_stride, begin;         // outputs begin .. points - 1 are stored, from y on
};

struct ConvolutionLoops {
  int lanes;
  // to `spectrum`, [size, 2, lanes] floats
  void (*transform)(const PlanTables& plan, const FilterRows& rows, float* spectrum);
  // through `work`, as large as a spectrum
  void (*convolve)(const PlanTables& plan, const SignalRows& rows, const float* spectrum, float* work);
  // sum of h[t - s] u[s] over s = 0 .. t
  float (*output)(const float* u, const float* h, int64_t t);
};

XEXPORT_DECLARE_LOOPS(ConvolutionLoops, convolution_loops)

}  // namespace xexport
