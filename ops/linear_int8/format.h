// A product with 8-bit weights: what a kernel has to know of it (ops/native/linear.h).
#pragma once

#include "../native/linear.h"
#include "loops.h"

namespace xexport {

class Int8 {
 public:
  static constexpr const char* kName = "linear_int8";
  static constexpr ort::Element kTypes[] = {ort::Element::f32, ort::Element::u8, ort::Element::f32};
  static const ProductLoops& loops(Isa isa) { return linear_int8_loops(isa); }
  static int64_t columns(ort::ShapeContext* context) { return inferred_first(context, 1); }

  explicit Int8(const Node& node) : depth_(node.integer("K")), columns_(node.integer("N")) {}
  Int8(int64_t depth, int64_t columns, int64_t) : depth_(depth), columns_(columns) {}

  Product task(const Node& node, const Tensor* in) const {
    const Tensor &weight = in[1], &scales = in[2];
    node.expect(weight, ort::Element::u8, {-1, -1, -1});
    Product p = {};
    p.columns = weight.dim[0];
    p.blocks = weight.dim[1];
    p.block = weight.dim[2];
    if (p.block != 32 && p.block != 64 && p.block != 128) {
      node.fail("blocks must be of 32, 64 or 128 weights, got " + weight.describe());
    }
    node.expect(scales, ort::Element::f32, {p.columns, p.blocks});
    p.depth = depth_;
    if (p.columns != columns_ || (depth_ + p.block - 1) / p.block != p.blocks) {
      node.fail("K " + std::to_string(depth_) + " and N " + std::to_string(columns_) +
                " disagree with the weight, " + weight.describe());
    }
    p.codes = static_cast<const uint8_t*>(weight.data);
    p.scales = scales.data;
    return p;
  }

  static double bytes(const Product& p) { return static_cast<double>(p.columns * p.blocks * (p.block + 4)); }

 private:
  int64_t depth_, columns_;
};

}  // namespace xexport
