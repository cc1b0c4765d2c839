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

// Heads at a time, at most.
constexpr int64_t kWkv7Heads = 6;

struct Wkv7Loops {
  // `count` heads of the same sizes; neighbours, so that what is read for one serves the next.
  void (*run)(const Wkv7Head* heads, int64_t count, float* scratch);
  int64_t (*scratch)(int64_t size);  // floats that `run` needs
};

XEXPORT_DECLARE_LOOPS(Wkv7Loops, wkv7_loops)

}  // namespace xexport
