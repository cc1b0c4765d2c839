// The inner loops of cached_attention, in one version per instruction set.
#pragma once

#include <cstdint>

#include "../native/isa.h"

namespace xexport {

// Rows at a time: a row is one query head at one token.
constexpr int64_t kAttentionRows = 32;

// The query heads that share one head of keys, of one sequence. Row r is head r % group of token r / group.
struct AttentionHead {
  const float* q;        // token 0, first head of the group; heads are `size` floats apart
  const float* keys;     // [.., size], all up to the last token of the chunk
  const float* values;   // [.., width]
  float* out;            // as q, heads are `width` floats apart
  int64_t q_stride, out_stride;  // floats from token to token
  int64_t group, size, width;
  int64_t begin;         // token t of the chunk sees keys 0 .. begin + t
  float scale;
};

struct AttentionLoops {
  // Rows first .. last - 1, at most kAttentionRows.
  void (*run)(const AttentionHead& head, int64_t first, int64_t last, float* scratch);
  int64_t (*scratch)(int64_t size, int64_t width);  // floats that `run` needs
};

XEXPORT_DECLARE_LOOPS(AttentionLoops, attention_loops)

}  // namespace xexport
