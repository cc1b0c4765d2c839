// The kernel of every matrix product: checks, and its format's loops.
//
// A format has
//   static constexpr const char* kName;
//   static constexpr ort::Element kTypes[];            of (x, weights) or (x, weights, scales)
//   static const ProductLoops& loops(Isa);
//   static int64_t columns(ort::ShapeContext*);          of the result, or -1 if that is not known
//   Format(const Node&);                                 reads attributes
//   Format(int64_t depth, int64_t columns, int64_t block);
//   Product task(const Node&, const Tensor* in) const;   checks the weights, and fills what they determine
//   static double bytes(const Product&);                 of the weights
#pragma once

#include "multiply.h"

namespace xexport {

// Fills what x determines, and asks for the output.
inline void add_activations(const Node& node, const Call& call, const Tensor& x, size_t output, Product& task) {
  if (x.type != ort::Element::f32 || x.rank < 1 || x.rank > Tensor::kMaxRank || x.dim[x.rank - 1] != task.depth) {
    node.fail("x must be float32 [...," + std::to_string(task.depth) + "], got " + x.describe());
  }
  int64_t dims[Tensor::kMaxRank];
  task.tokens = 1;
  for (size_t i = 0; i < x.rank; ++i) {
    dims[i] = x.dim[i];
    if (i + 1 < x.rank) task.tokens *= x.dim[i];
  }
  dims[x.rank - 1] = task.columns;
  task.x = x.floats();
  task.y = call.output(output, dims, x.rank).floats();
}

template <class Format>
class Linear {
 public:
  static constexpr const char* kName = Format::kName;
  static constexpr const auto& kInputs = Format::kTypes;
  static constexpr ort::Element kOutputs[] = {ort::Element::f32};
  static constexpr int kInPlace[] = {-1, -1};
  static void infer(ort::ShapeContext* context) { infer_columns(context, 0, Format::columns(context), 0); }

  Linear(const Node& node, Isa isa) : node_(node), format_(node), loops_(Format::loops(isa)) {}

  void compute(const Call& call) const {
    static constexpr const char* kNames[] = {"x", "weight", "scales"};
    Tensor in[std::size(kInputs)];
    for (size_t i = 0; i < std::size(kInputs); ++i) in[i] = call.input(i, kNames[i]);
    Multiplication only = {&loops_, format_.task(node_, in), 0};
    add_activations(node_, call, in[0], 0, only.task);
    only.bytes = Format::bytes(only.task);
    multiply(call, &only, 1);
  }

 private:
  Node node_;
  Format format_;
  const ProductLoops& loops_;
};

}  // namespace xexport
