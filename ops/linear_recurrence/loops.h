// The inner loops of linear_recurrence, in one version per instruction set.
#pragma once

#include <cstdint>

#include "../native/isa.h"

namespace xexport {

// One head of one sequence: K keys, V values.
struct LinearHead {
  const float *q, *k;    // [tokens, K], `key_stride` floats from token to token
  const float* v;        // [tokens, V], `value_stride`
  const float* decay;    // logarithms [tokens, K], or [tokens, 1]; `decay_stride`
  const float* state;    // [K, V]
  float* new_state;      // may be `state`
  float* out;            // as v
  int64_t tokens, keys, values, key_stride, value_stride, decay_stride;
  bool decay_a_key;
  float scale;
};

struct LinearLoops {
  void (*head)(const LinearHead& head, float* scratch);
  int64_t (*scratch)(int64_t keys);  // floats that `head` needs
};

XEXPORT_DECLARE_LOOPS(LinearLoops, linear_recurrence_loops)

}  // namespace xexport
