// xexport::linear: (x [...,K] float32, weight [N,K] float32 or float16) -> [...,N] float32.
// The definition is reference.py; the arithmetic is in loops.cc.
#include "../native/linear.h"
#include "loops.h"

namespace xexport {
namespace {

using ort::Element;

template <Element Type>
class Float {
 public:
  static constexpr const char* kName = "linear";
  static constexpr Element kTypes[] = {Element::f32, Type};
  static const ProductLoops& loops(Isa isa) {
    return Type == Element::f16 ? linear_f16_loops(isa) : linear_f32_loops(isa);
  }

  static int64_t columns(ort::ShapeContext* context) { return inferred_first(context, 1); }

  explicit Float(const Node&) {}

  Product task(const Node& node, const Tensor* in) const {
    node.expect(in[1], Type, {-1, -1});
    Product p = {};
    p.columns = in[1].dim[0];
    p.depth = in[1].dim[1];
    p.codes = static_cast<const uint8_t*>(in[1].data);
    return p;
  }

  static double bytes(const Product& p) {
    return static_cast<double>(p.columns * p.depth * (Type == Element::f16 ? 2 : 4));
  }
};

const Registered<Linear<Float<Element::f32>>> registered_f32;
const Registered<Linear<Float<Element::f16>>> registered_f16;

}  // namespace
}  // namespace xexport
