// xexport::wkv4: (w, u [C], k, v [B,T,C], aa, bb, pp [B,C]) -> (y [B,T,C], new_aa, new_bb, new_pp [B,C]).
// The definition is reference.py; the arithmetic is in loops.cc. One unit of work is a block of channels.
#include <algorithm>
#include <cstring>

#include "../native/operator.h"
#include "loops.h"

namespace xexport {
namespace {

using ort::Element;

class Wkv4Kernel {
 public:
  static constexpr const char* kName = "wkv4";
  static constexpr Element kInputs[] = {Element::f32, Element::f32, Element::f32, Element::f32,
                                        Element::f32, Element::f32, Element::f32};
  static constexpr Element kOutputs[] = {Element::f32, Element::f32, Element::f32, Element::f32};
  static constexpr int kInPlace[] = {-1, -1};  // three vectors: nothing to gain
  static void infer(ort::ShapeContext* context) {
    infer_like(context, 3, 0, 3);
    for (size_t i = 0; i < 3; ++i) infer_like(context, 4 + i, 1 + i, 2);
  }

  Wkv4Kernel(const Node& node, Isa isa) : node_(node), loops_(wkv4_loops(isa)) {}

  void compute(const Call& call) const {
    static constexpr const char* kNames[] = {"w", "u", "k", "v", "aa", "bb", "pp"};
    Tensor in[7];
    for (size_t i = 0; i < 7; ++i) in[i] = call.input(i, kNames[i]);
    node_.expect(in[2], Element::f32, {-1, -1, -1});
    const int64_t B = in[2].dim[0], T = in[2].dim[1], C = in[2].dim[2];
    node_.expect(in[0], Element::f32, {C});
    node_.expect(in[1], Element::f32, {C});
    node_.expect(in[3], Element::f32, {B, T, C});
    for (size_t i = 4; i < 7; ++i) node_.expect(in[i], Element::f32, {B, C});
    float* y = call.output(0, in[2].dim, 3).floats();
    float* after[3];
    for (size_t i = 0; i < 3; ++i) after[i] = call.output(1 + i, in[4].dim, 2).floats();
    const int64_t blocks = (C + kBlock - 1) / kBlock;
    const double work = 8.0 * static_cast<double>(B * T) * static_cast<double>(C);
    call.parallel(B * blocks, work, [&](int64_t unit) {
      const int64_t b = unit / blocks, first = unit % blocks * kBlock;
      Wkv4 x = {in[0].floats(), in[1].floats(), in[2].floats() + b * T * C, in[3].floats() + b * T * C,
                {},             {},             y + b * T * C,              T,
                C};
      for (size_t i = 0; i < 3; ++i) {
        x.state[i] = in[4 + i].floats() + b * C;
        x.new_state[i] = after[i] + b * C;
      }
      loops_.run(x, first, std::min(first + kBlock, C));
    });
  }

 private:
  static constexpr int64_t kBlock = 64;  // channels of a unit: whole vectors of every instruction set
  Node node_;
  const Wkv4Loops& loops_;
};

const Registered<Wkv4Kernel> registered;

}  // namespace
}  // namespace xexport
