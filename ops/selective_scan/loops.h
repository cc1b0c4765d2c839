// The inner loops of selective_scan, in one version per instruction set.
#pragma once

#include <cstdint>

#include "../native/isa.h"

namespace xexport {

// One sequence; the pointers are those of the sequence, not of a block of channels.
struct SelectiveScan {
  const float *u, *dt;  // [tokens, channels]
  const float* A;       // [channels, size]
  const float *B, *C;   // [tokens, size]
  const float* D;       // [channels]
  const float* state;   // [channels, size]
  float* new_state;     // may be `state`
  float* y;             // [tokens, channels]
  int64_t tokens, channels, size;
};

// Channels at a time, at most: whole vectors of every instruction set.
constexpr int64_t kScanChannels = 512;

struct SelectiveScanLoops {
  // Channels first .. last - 1, at most kScanChannels of them; `scratch` as below.
  void (*run)(const SelectiveScan& scan, int64_t first, int64_t last, float* scratch);
  int64_t (*scratch)(int64_t size);  // floats that `run` needs
};

XEXPORT_DECLARE_LOOPS(SelectiveScanLoops, selective_scan_loops)

}  // namespace xexport
