// xexport::fused_rows_<i>: (row inputs, weights, histories) -> (row outputs, tails), as the node's program says.
//
// The kernel is the same for every i. The number tells apart the function bodies that a file carries for
// runtimes without this library: a function's name is all that ties a node to its body.
#include <cstring>
#include <algorithm>

#include "../native/operator.h"
#include "program.h"

namespace xexport {
namespace {

using ort::Element;

// A file has one function for every different chain of nodes; hybrids of many layers have some twenty.
constexpr int kNames = 64;

class FusedRows {
 public:
  static constexpr const char* kName = "fused_rows";
  static constexpr Element kInputs[] = {Element::f32};
  static constexpr Element kOutputs[] = {Element::f32};
  static constexpr int kInPlace[] = {-1, -1};
  static void infer(ort::ShapeContext*) {}

  FusedRows(const Node& node, Isa isa)
      : node_(node), loops_(row_loops(isa)), program_(read(node)), fixed_(program_.inputs.size()) {
    for (size_t i = 0; i < program_.inputs.size(); ++i) {
      if (program_.inputs[i].kind != PortKind::fixed) {
        first_rows_ = first_rows_ == kNone && program_.inputs[i].kind == PortKind::rows ? i : first_rows_;
        continue;
      }
      const Tensor constant = node.constant(i, "weight");
      if (constant.data == nullptr) continue;
      expect_fixed(constant, i);
      fixed_[i] = constant.floats();
    }
  }

  void compute(const Call& call) const {
    const size_t inputs = program_.inputs.size(), outputs = program_.outputs.size();
    if (call.input_count() != inputs) node_.fail("the program has " + std::to_string(inputs) + " inputs");
    const Tensor first = call.input(first_rows_, "rows");
    if (first.type != Element::f32 || first.rank < 2 || first.rank > Tensor::kMaxRank) {
      node_.fail("rows must be float32 [B,T,...], got " + first.describe());
    }
    const int64_t B = first.dim[0], T = first.dim[1];
    const float* in[kMostPorts];
    float* out[kMostPorts];
    for (size_t i = 0; i < inputs; ++i) {
      if (fixed_[i] != nullptr) {
        in[i] = fixed_[i];
        continue;
      }
      const Tensor tensor = i == first_rows_ ? first : call.input(i, "input");
      expect_input(tensor, i, B, T);
      in[i] = tensor.floats();
    }
    for (size_t i = 0; i < outputs; ++i) {
      const Port& port = program_.outputs[i];
      int64_t dims[Tensor::kMaxRank + 2] = {B, T};
      size_t rank = port.kind == PortKind::output ? 2 : 1;
      for (int64_t dim : port.shape) dims[rank++] = dim;
      out[i] = call.output(i, dims, rank).floats();
    }
    if (T == 0) return keep_histories(in, out, B);
    const int64_t rows = B * T;
    const double work = static_cast<double>(rows) * row_work_;
    // parts long enough that the rows computed twice don't matter
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(16, rows / (8 * (program_.depth + 1))));
    call.parallel(parts, work, [&](int64_t part) {
      run_rows(in, out, T, rows * part / parts, rows * (part + 1) / parts);
    });
  }

  static constexpr size_t kMostPorts = 128;

 private:
  static constexpr size_t kNone = static_cast<size_t>(-1);

  RowProgram read(const Node& node) {
    try {
      RowProgram program(node.integers("program"), node.numbers("constants"));
      if (program.inputs.size() > kMostPorts || program.outputs.size() > kMostPorts) {
        throw std::runtime_error("the attribute program has too many inputs or outputs");
      }
      for (const RowInstruction& i : program.instructions) {
        row_work_ += 4.0 + static_cast<double>(i.outer * i.inner) / (i.op >= RowOp::exp && i.op <= RowOp::silu ? 2 : 8);
      }
      for (const Port& port : program.outputs) {
        dummies_.push_back(dummy_);
        dummy_ += port.width;
      }
      return program;
    } catch (const std::runtime_error& error) {
      node.fail(error.what());
    }
  }

  void expect_fixed(const Tensor& tensor, size_t i) const {
    const bool fits = tensor.rank <= Tensor::kMaxRank && tensor.count() == program_.inputs[i].width;
    if (tensor.type != Element::f32 || !fits) {
      node_.fail("input " + std::to_string(i) + " must be " + std::to_string(program_.inputs[i].width) +
                 " float32, got " + tensor.describe());
    }
  }

  void expect_input(const Tensor& tensor, size_t i, int64_t B, int64_t T) const {
    const Port& port = program_.inputs[i];
    if (port.kind == PortKind::fixed) return expect_fixed(tensor, i);
    int64_t lead[2] = {B, T};
    size_t count = 2;
    if (port.kind == PortKind::tokens) lead[0] = T;
    if (port.kind != PortKind::rows) count = 1;
    bool same = tensor.type == Element::f32 && tensor.rank == count + port.shape.size();
    for (size_t d = 0; same && d < count; ++d) same = tensor.dim[d] == lead[d];
    for (size_t d = 0; same && d < port.shape.size(); ++d) same = tensor.dim[count + d] == port.shape[d];
    if (same) return;
    Tensor wanted;
    wanted.type = Element::f32;
    wanted.rank = count + port.shape.size();
    for (size_t d = 0; d < wanted.rank; ++d) wanted.dim[d] = d < count ? lead[d] : port.shape[d - count];
    node_.fail("input " + std::to_string(i) + " must be " + wanted.describe() + ", got " + tensor.describe());
  }

  // Without tokens what a shift looks back on stays as it was.
  void keep_histories(const float* const* in, float* const* out, int64_t B) const {
    for (const RowTail& tail : program_.tails) {
      const auto same = [&](const RowShift& s) { return s.source == tail.source && s.width == tail.width; };
      const auto shift = std::find_if(program_.shifts.begin(), program_.shifts.end(), same);
      if (shift == program_.shifts.end()) node_.fail("there are no tokens, of which an output is the last");
      copy(out[static_cast<size_t>(tail.output)], in[static_cast<size_t>(shift->history)], B * tail.width);
    }
  }

  // Rows [begin, end) of the B*T; those before that a shift looks back on are computed again, without output.
  void run_rows(const float* const* in, float* const* out, int64_t T, int64_t begin, int64_t end) const {
    const size_t count = program_.places.size();
    const size_t pointers = (count * sizeof(float*) + 63) / 64 * 64 / sizeof(float);
    float* memory = scratch(pointers + static_cast<size_t>(program_.registers + dummy_) + 32);
    float** places = reinterpret_cast<float**>(memory);
    float* registers = memory + pointers;
    float* dummy = registers + program_.registers;
    const int64_t warm = program_.shifts.empty() ? 0 : std::min(begin % T, program_.depth);
    for (int64_t row = begin - warm; row < end; ++row) {
      const int64_t b = row / T, t = row % T;
      for (size_t i = 0; i < count; ++i) {
        const Place& p = program_.places[i];
        const auto index = static_cast<size_t>(p.index);
        switch (p.kind) {
          case PortKind::rows: places[i] = at(in[index], row * program_.inputs[index].width + p.offset); break;
          case PortKind::tokens: places[i] = at(in[index], t * program_.inputs[index].width + p.offset); break;
          case PortKind::fixed: places[i] = at(in[index], p.offset); break;
          case PortKind::literal: places[i] = at(program_.literals.data(), p.index); break;
          case PortKind::output:
            places[i] = row < begin ? dummy + dummies_[index] + p.offset
                                    : out[index] + row * program_.outputs[index].width + p.offset;
            break;
          default: places[i] = registers + p.offset;
        }
      }
      if (t == 0) {
        for (const RowShift& s : program_.shifts) {
          copy(registers + s.offset, in[static_cast<size_t>(s.history)] + b * s.width, s.width);
        }
      }
      loops_.run(program_.instructions.data(), static_cast<int64_t>(program_.instructions.size()), places,
                 program_.literals.data());
      for (const RowShift& s : program_.shifts) {
        copy(registers + s.offset, places[static_cast<size_t>(s.source)], s.width);
      }
      if (t != T - 1 || row < begin) continue;
      for (const RowTail& tail : program_.tails) {
        copy(out[static_cast<size_t>(tail.output)] + b * tail.width, places[static_cast<size_t>(tail.source)], tail.width);
      }
    }
  }

  static float* at(const float* base, int64_t offset) { return const_cast<float*>(base) + offset; }
  static void copy(float* to, const float* from, int64_t count) {
    std::memmove(to, from, static_cast<size_t>(count) * sizeof(float));
  }

  Node node_;
  const RowLoops& loops_;
  double row_work_ = 0;
  int64_t dummy_ = 0;  // floats that stand for the outputs of a row computed again
  std::vector<int64_t> dummies_;
  RowProgram program_;  // after what reading it fills
  std::vector<const float*> fixed_;
  size_t first_rows_ = kNone;
};

const RegisteredNumbered<FusedRows, kNames> registered;

}  // namespace
}  // namespace xexport
