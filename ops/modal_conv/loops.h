// The inner loops of modal_conv, in one version per instruction set.
#pragma once

#include <cstdint>

#include "../native/isa.h"

namespace xexport {

// One sequence; the pointers are those of the sequence, not of a block of channels.
struct ModalConv {
  const float* packed;                // [tokens, 3, channels]: x0, x1, v
  const float *poles, *residues;      // [order, 2, channels]
  const float* skip;                  // [channels]
  const float* state;                 // [order, 2, channels]
  float* new_state;                   // may be `state`
  float* y;                           // [tokens, channels]
  int64_t tokens, channels, order;
};

// Channels of a unit of work: whole tiles of every instruction set.
constexpr int64_t kModalChannels = 64;

struct ModalConvLoops {
  // Channels first .. last - 1; `scratch` as below.
  void (*run)(const ModalConv& conv, int64_t first, int64_t last, float* scratch);
  int64_t (*scratch)(int64_t order);  // floats that `run` needs
};

XEXPORT_DECLARE_LOOPS(ModalConvLoops, modal_conv_loops)

}  // namespace xexport
