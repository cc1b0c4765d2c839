// The inner loops of wkv7, in one version per instruction set.
#pragma once

#include <cstdint>

#include "../native/isa.h"

namespace xexport {

// One head of one sequence.
struct Wkv7Head {
  const float *r, *w, *k, *v, *a, *b;  // [tokens, size], `stride` floats from token to token
  const float* state;                  // [size, size], S[v,k]
  float* new_state;                    // may be `state`
  float* y;                            // as r
  int64_t tokens, stride, size;
};

struct Wkv7Loops {
  void (*head)(const Wkv7Head& head, float* scratch);
  int64_t (*scratch)(int64_t size);  // floats that `head` needs
};

XEXPORT_DECLARE_LOOPS(Wkv7Loops, wkv7_loops)

}  // namespace xexport
