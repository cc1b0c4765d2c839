// Instructions over one row, in one version per instruction set. See program.py for the words.
#pragma once

#include <cstdint>

#include "../native/isa.h"

namespace xexport {

// The order is that of program.py.
enum class RowOp : int64_t {
  copy, neg, abs, exp, sqrt, reciprocal, sigmoid, tanh, relu, softplus, gelu, gelu_tanh, erf, silu,
  add, sub, mul, div, max, min,
  sum, mean, largest, l2,
  layer_norm, rms_norm,
  mul_add, pick, place,
  count
};

struct RowInstruction {
  RowOp op;
  int64_t dst, a, b, c;  // places
  int64_t outer, inner;
  bool a_single;   // one float a turn
  int64_t a_step;  // of a norm: which literal is its epsilon
  bool b_single;
  int64_t b_step;
};

struct RowLoops {
  // Runs every instruction on one row; places[i] points to its values.
  void (*run)(const RowInstruction* instructions, int64_t count, float* const* places, const float* literals);
};

XEXPORT_DECLARE_LOOPS(RowLoops, row_loops)

}  // namespace xexport
