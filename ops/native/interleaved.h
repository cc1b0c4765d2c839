// Weights of which eight rows lie side by side, in blocks of 32 with a float16 scale each: checks and sizes.
//
// `kVectors` times four bytes of a row are a block: weight [groups, blocks, kVectors, 8, 4] uint8, scales
// [groups, blocks, 8]. interleaved_loops.h multiplies with them.
#pragma once

#include "linear.h"

namespace xexport {

template <int64_t kVectors>
class Interleaved {
 public:
  static constexpr ort::Element kTypes[] = {ort::Element::f32, ort::Element::u8, ort::Element::f16};
  static int64_t columns(ort::ShapeContext* context) { return inferred_integer(context, "N"); }

  explicit Interleaved(const Node& node) : depth_(node.integer("K")), columns_(node.integer("N")) {}
  Interleaved(int64_t depth, int64_t columns, int64_t) : depth_(depth), columns_(columns) {}

  Product task(const Node& node, const Tensor* in) const {
    const Tensor &weight = in[1], &scales = in[2];
    node.expect(weight, ort::Element::u8, {-1, -1, kVectors, kRows, 4});
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

  static double bytes(const Product& p) { return static_cast<double>(p.columns * p.blocks * (4 * kVectors + 2)); }

 private:
  static constexpr int64_t kRows = 8, kBlock = 32;
  int64_t depth_, columns_;
};

}  // namespace xexport
