// The inner loops of attention over cached keys, in one version per instruction set: for cached_attention,
// window_attention and dilated_attention.
#pragma once

#include <cstdint>

#include "../native/isa.h"

namespace xexport {

// Rows at a time: a row is one query head at one token.
constexpr int64_t kAttentionRows = 32;

// Rows that look at the same keys, and what they have seen so far. The largest score is kept, so any number of
// runs of keys may follow one another.
struct AttentionRows {
  int64_t count;                     // at most kAttentionRows
  int64_t size, width;               // of a key, of a value
  float scale;
  const float* q[kAttentionRows];    // [size]
  float* out[kAttentionRows];        // [width]
  int64_t from[kAttentionRows], to[kAttentionRows];  // which keys of the next run a row sees: from .. to - 1
  float* scratch;                    // AttentionLoops::scratch floats; the rest is the loops' own
  float largest[kAttentionRows], sum[kAttentionRows];
};

// Keys and values a fixed distance apart.
struct KeyRun {
  const float *keys, *values;
  int64_t key_stride, value_stride, count;
};

struct AttentionLoops {
  void (*begin)(AttentionRows& rows);                    // nothing seen yet; reads q
  void (*query)(AttentionRows& rows);                    // reads q again: other queries for the runs to come
  void (*over)(AttentionRows& rows, const KeyRun& run);  // looks at a run of keys
  void (*finish)(AttentionRows& rows);                   // writes out; zeros where nothing was seen
  int64_t (*scratch)(int64_t size, int64_t width);       // floats that the rows need
};

XEXPORT_DECLARE_LOOPS(AttentionLoops, attention_loops)

}  // namespace xexport
