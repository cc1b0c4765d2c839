// The inner loops of wkv4, in one version per instruction set.
#pragma once

#include <cstdint>

#include "../native/isa.h"

namespace xexport {

// One sequence.
struct Wkv4 {
  const float *w, *u;           // [channels]
  const float *k, *v;           // [tokens, channels]
  const float* state[3];        // aa, bb, pp: [channels]
  float* new_state[3];
  float* y;                     // as k
  int64_t tokens, channels;
};

struct Wkv4Loops {
  void (*run)(const Wkv4& x, int64_t first, int64_t last);  // channels first .. last - 1
};

XEXPORT_DECLARE_LOOPS(Wkv4Loops, wkv4_loops)

}  // namespace xexport
