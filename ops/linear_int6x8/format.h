// A product with 6-bit weights: what a kernel has to know of it (ops/native/linear.h).
#pragma once

#include "../native/interleaved.h"
#include "loops.h"

namespace xexport {

class Int6 : public Interleaved<6> {
 public:
  using Interleaved::Interleaved;
  static constexpr const char* kName = "linear_int6x8";
  static const ProductLoops& loops(Isa isa) { return linear_int6x8_loops(isa); }
};

}  // namespace xexport
