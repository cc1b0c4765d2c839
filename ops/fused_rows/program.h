// A program over rows as the kernel holds it; the encoding is program.py's.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "loops.h"

namespace xexport {

enum class PortKind : int64_t { reg = 0, rows = 1, tokens = 2, fixed = 3, history = 4, output = 5, tail = 6, literal = 7 };

struct Port {
  PortKind kind;
  std::vector<int64_t> shape;  // without B and T
  int64_t width;
};

struct Place {
  PortKind kind;
  int64_t index, width, offset;
};

struct RowShift {
  int64_t source, history, offset, width;
};

struct RowTail {
  int64_t source, output, width;
};

struct RowProgram {
  std::vector<Port> inputs, outputs;
  std::vector<Place> places;
  std::vector<RowInstruction> instructions;
  std::vector<RowShift> shifts;
  std::vector<RowTail> tails;
  std::vector<float> literals;
  int64_t registers = 0, depth = 0;

  // Reads and checks everything: no instruction can reach beyond what a place has.
  // Throws std::runtime_error that says what is wrong.
  RowProgram(const std::vector<int64_t>& numbers, std::vector<float> constants);
};

}  // namespace xexport
