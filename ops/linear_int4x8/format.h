// A product with 4-bit weights: what a kernel has to know of it (ops/native/linear.h).
#pragma once

#include "../native/interleaved.h"
#include "loops.h"

namespace xexport {

class Int4 : public Interleaved<4> {
 public:
  using Interleaved::Interleaved;
  static constexpr const char* kName = "linear_int4x8";
  static const ProductLoops& loops(Isa isa) { return linear_int4x8_loops(isa); }
};

}  // namespace xexport
