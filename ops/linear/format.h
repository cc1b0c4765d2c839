// A product with float32 or float16 weights: what a kernel has to know of it (ops/native/linear.h).
#pragma once

#include "../native/linear.h"
#include "loops.h"

namespace xexport {

template <ort::Element Type>
class Float {
 public:
  static constexpr const char* kName = "linear";
  static constexpr ort::Element kTypes[] = {ort::Element::f32, Type};
  static const ProductLoops& loops(Isa isa) {
    return Type == ort::Element::f16 ? linear_f16_loops(isa) : linear_f32_loops(isa);
  }

  static int64_t columns(ort::ShapeContext* context) { return inferred_first(context, 1); }

  explicit Float(const Node&) {}
  Float(int64_t depth, int64_t columns, int64_t) : depth_(depth), columns_(columns) {}

  Product task(const Node& node, const Tensor* in) const {
    node.expect(in[1], Type, {-1, -1});
    Product p = {};
    p.columns = in[1].dim[0];
    p.depth = in[1].dim[1];
    if (columns_ >= 0 && (p.columns != columns_ || p.depth != depth_)) {
      node.fail("K " + std::to_string(depth_) + " and N " + std::to_string(columns_) + " disagree with the weight, " +
                in[1].describe());
    }
    p.codes = static_cast<const uint8_t*>(in[1].data);
    return p;
  }

  static double bytes(const Product& p) {
    return static_cast<double>(p.columns * p.depth * (Type == ort::Element::f16 ? 2 : 4));
  }

 private:
  int64_t depth_ = -1, columns_ = -1;  // any
};

}  // namespace xexport
