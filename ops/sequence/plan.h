// What one xexport::sequence_<i> node runs: which operators, and where their tensors are.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace xexport {

// Values are numbered: first the node's inputs, then the outputs of every part in their order.
struct SequencePart {
  std::string op;              // without a number; kReshape is a tensor in another shape
  std::vector<size_t> inputs;  // values
  // Of every output: n, the node's output n; -1 - n, the memory n, which later outputs use again.
  std::vector<int64_t> places;
};

struct SequencePlan {
  static constexpr const char* kReshape = "reshape";

  size_t inputs = 0, values = 0, outputs = 0, memories = 0;
  std::vector<SequencePart> parts;

  // Reads the attribute `plan`: the number of inputs, and of every part the length of its name, the name in
  // ASCII, the number of inputs, those, the number of outputs, their places.
  // Throws a std::runtime_error where numbers are missing, a name is no name, or a value comes before it is made.
  explicit SequencePlan(const std::vector<int64_t>& numbers);
};

}  // namespace xexport
