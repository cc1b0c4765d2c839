// A product with 4-bit weights: what a kernel has to know of it (ops/native/linear.h).
#pragma once

#include "../native/linear.h"
#include "loops.h"

namespace xexport {

class Int4 {
 public:
  static constexpr const char* kName = "linear_int4x8";
  static constexpr ort::Element kTypes[] = {ort::Element::f32, ort::Element::u8, ort::Element::f16};
  static const ProductLoops& loops(Isa isa) { return linear_int4x8_loops(isa); }
  static int64_t columns(ort::ShapeContext* context) { return inferred_integer(context, "N"); }

  explicit Int4(const Node& node) : depth_(node.integer("K")), columns_(node.integer("N")) {}
  Int4(int64_t depth, int64_t columns, int64_t) : depth_(depth), columns_(columns) {}

  Product task(const Node& node, const Tensor* in) const {
    const Tensor &weight = in[1], &scales = in[2];
    node.expect(weight, ort::Element::u8, {-1, -1, 4, kRows, 4});
    Product p = {};
    p.columns = columns_;
    p.blocks = weight.dim[1];
    p.block = kBlock;
    p.depth = depth_;
    node.expect(scales, ort::Element::f16, {weight.dim[0], p.blocks, kRows});
    if ((columns_ + kRows - 1) / kRows != weight.dim[0] || (depth_ + kBlock - 1) / kBlock != p.blocks) {
      node.fail("K " + std::to_string(depth_) + " and N " + std::to_string(columns_) + " disagree with the weight, " +
                weight.describe());
    }
    p.codes = static_cast<const uint8_t*>(weight.data);
    p.scales = scales.data;
    return p;
  }

  static double bytes(const Product& p) { return static_cast<double>(p.columns * p.blocks * 18); }

 private:
  static constexpr int64_t kRows = 8, kBlock = 32;
  int64_t depth_, columns_;
};

}  // namespace xexport
