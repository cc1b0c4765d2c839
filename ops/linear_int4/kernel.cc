// xexport::linear_int4: (x [...,K] float32, weight [N,blocks,16] uint8, scales [N,blocks] float16) -> [...,N].
// The definition is reference.py; the arithmetic is in loops.cc.
#include "../native/linear.h"
#include "loops.h"

namespace xexport {
namespace {

using ort::Element;

class Int4 {
 public:
  static constexpr const char* kName = "linear_int4";
  static constexpr Element kTypes[] = {Element::f32, Element::u8, Element::f16};
  static const ProductLoops& loops(Isa isa) { return linear_int4_loops(isa); }

  explicit Int4(const Node& node) : depth_(node.integer("K")), columns_(node.integer("N")) {}

  Product task(const Node& node, const Tensor* in) const {
    const Tensor &weight = in[1], &scales = in[2];
    node.expect(weight, Element::u8, {-1, -1, 16});
    Product p = {};
    p.columns = weight.dim[0];
    p.blocks = weight.dim[1];
    p.block = 32;
    p.depth = depth_;
    node.expect(scales, Element::f16, {p.columns, p.blocks});
    if (p.columns != columns_ || (depth_ + p.block - 1) / p.block != p.blocks) {
      node.fail("K " + std::to_string(depth_) + " and N " + std::to_string(columns_) + " disagree with the weight, " +
                weight.describe());
    }
    p.codes = static_cast<const uint8_t*>(weight.data);
    p.scales = scales.data;
    return p;
  }

  static double bytes(const Product& p) { return static_cast<double>(p.columns * p.blocks * 18); }

 private:
  int64_t depth_, columns_;
};

const Registered<Linear<Int4>> registered;

}  // namespace
}  // namespace xexport
