// xexport::causal_conv1d: (x [B,T,D], weight [K,D], bias [D], state [B,K-1,D]; channels, silu)
//                         -> (y [B,T,D], new_state [B,K-1,D]), K >= 1, channels = D.
// The definition is reference.py; the arithmetic is in loops.cc. One unit of work is some tokens of a sequence.
#include <algorithm>
#include <cstring>

#include "../native/operator.h"
#include "loops.h"

namespace xexport {
namespace {

using ort::Element;

class CausalConv1d {
 public:
  static constexpr const char* kName = "causal_conv1d";
  static constexpr Element kInputs[] = {Element::f32, Element::f32, Element::f32, Element::f32};
  static constexpr Element kOutputs[] = {Element::f32, Element::f32};
  static constexpr int kInPlace[] = {3, 1};
  static void infer(ort::ShapeContext* context) {
    infer_like(context, 0, 0, 3);
    infer_like(context, 3, 1, 3);
  }

  CausalConv1d(const Node& node, Isa isa)
      : node_(node),
        channels_(node.integer("channels")),
        silu_(node.integer("silu")),
        loops_(short_convolution_loops(isa)) {
    if (silu_ != 0 && silu_ != 1) node.fail("silu must be 0 or 1, got " + std::to_string(silu_));
  }

  void compute(const Call& call) const {
    const Tensor x = call.input(0, "x"), weight = call.input(1, "weight");
    const Tensor bias = call.input(2, "bias"), state = call.input(3, "state");
    node_.expect(x, Element::f32, {-1, -1, channels_});
    const int64_t B = x.dim[0], T = x.dim[1], D = channels_;
    node_.expect(weight, Element::f32, {-1, D});
    const int64_t K = weight.dim[0];
    if (K == 0) node_.fail("weight must have a tap at least");
    node_.expect(bias, Element::f32, {D});
    node_.expect(state, Element::f32, {B, K - 1, D});
    float* y = call.output(0, x.dim, 3).floats();
    float* after = call.output(1, state.dim, 3).floats();

    const int64_t blocks = (T + kBlock - 1) / kBlock;
    const double work = 3.0 * static_cast<double>(B * T) * static_cast<double>(D);
    call.parallel(B * blocks, work, [&](int64_t unit) {
      const int64_t b = unit / blocks, begin = unit % blocks * kBlock;
      const ShortConvolution conv = {x.floats() + b * T * D, weight.floats(), bias.floats(),
                                     state.floats() + b * (K - 1) * D, y + b * T * D, D, K, silu_ == 1};
      loops_.run(conv, begin, std::min(begin + kBlock, T));
    });
    // afterwards, as the new state may lie where the old one does
    const int64_t kept = std::max<int64_t>(K - 1 - T, 0), added = K - 1 - kept;
    for (int64_t b = 0; b < B; ++b) {
      float* to = after + b * (K - 1) * D;
      move(to, state.floats() + (b * (K - 1) + (K - 1 - kept)) * D, kept * D);
      move(to + kept * D, x.floats() + (b * T + T - added) * D, added * D);
    }
  }

 private:
  static constexpr int64_t kBlock = 64;  // tokens of a unit
  static void move(float* to, const float* from, int64_t count) {
    if (count > 0) std::memmove(to, from, static_cast<size_t>(count) * sizeof(float));
  }

  Node node_;
  int64_t channels_, silu_;
  const ShortConvolutionLoops& loops_;
};

const Registered<CausalConv1d> registered;

}  // namespace
}  // namespace xexport
