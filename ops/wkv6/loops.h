// The inner loops of wkv6, in one version per instruction set.
#pragma once

#include <cstdint>

#include "../native/isa.h"

namespace xexport {

// One head of one sequence.
struct Wkv6Head {
  const float *r, *w, *k, *v;  // [tokens, size] and v [tokens, width]
  const float* u;              // [size]
  const float* state;          // [size, width], S[k,v]
  float* new_state;            // may be `state`
  float* y;                    // [tokens, width]
  int64_t tokens, size, width;
  int64_t key_stride, decay_stride, value_stride;  // floats from token to token; decay_stride may be 0
};

struct Wkv6Loops {
  void (*head)(const Wkv6Head& head);
};

XEXPORT_DECLARE_LOOPS(Wkv6Loops, wkv6_loops)

}  // namespace xexport
