// xexport::linear_recurrence: (q, k [B,T,H*K], v [B,T,H*V], state [B,H,K,V], decay [B,T,H] or [B,T,H*K])
//                             -> (out [B,T,H*V], new_state [B,H,K,V]).
// The definition is reference.py; the arithmetic is in loops.cc. One unit of work is one head.
#include <cstring>

#include "../native/operator.h"
#include "loops.h"

namespace xexport {
namespace {

using ort::Element;

class LinearRecurrence {
 public:
  static constexpr const char* kName = "linear_recurrence";
  static constexpr Element kInputs[] = {Element::f32, Element::f32, Element::f32, Element::f32, Element::f32};
  static constexpr Element kOutputs[] = {Element::f32, Element::f32};
  static constexpr int kInPlace[] = {3, 1};
  static void infer(ort::ShapeContext* context) {
    infer_like(context, 2, 0, 3);
    infer_like(context, 3, 1, 4);
  }

  LinearRecurrence(const Node& node, Isa isa)
      : node_(node), loops_(linear_recurrence_loops(isa)), heads_(node.integer("heads")), scale_(node.real("scale")) {
    if (heads_ < 1) node.fail("heads must be 1 or more, got " + std::to_string(heads_));
  }

  void compute(const Call& call) const {
    static constexpr const char* kNames[] = {"q", "k", "v", "state", "decay"};
    Tensor in[5];
    for (size_t i = 0; i < 5; ++i) in[i] = call.input(i, kNames[i]);
    node_.expect(in[0], Element::f32, {-1, -1, -1});
    node_.expect(in[3], Element::f32, {in[0].dim[0], heads_, -1, -1});
    const int64_t B = in[0].dim[0], T = in[0].dim[1], H = heads_, K = in[3].dim[2], V = in[3].dim[3];
    node_.expect(in[0], Element::f32, {B, -1, H * K});
    node_.expect(in[1], Element::f32, {B, T, H * K});
    node_.expect(in[2], Element::f32, {B, T, H * V});
    const bool a_key = in[4].rank == 3 && in[4].dim[2] == H * K && K != 1;
    const int64_t row = a_key ? H * K : H;
    node_.expect(in[4], Element::f32, {B, T, row});
    float* out = call.output(0, in[2].dim, 3).floats();
    float* state = call.output(1, in[3].dim, 4).floats();
    const float* before = in[3].floats();
    if (T == 0) {
      if (state != before) std::memcpy(state, before, static_cast<size_t>(B * H * K * V) * sizeof(float));
      return;
    }
    const double work = work_of_states(B * H * K * V, T, 3.0 / 8);
    call.parallel(B * H, work, [&](int64_t unit) {
      const int64_t b = unit / H, h = unit % H, keys = (b * T * H + h) * K, values = (b * T * H + h) * V;
      const LinearHead head = {in[0].floats() + keys,
                               in[1].floats() + keys,
                               in[2].floats() + values,
                               in[4].floats() + b * T * row + h * (row / H),
                               before + unit * K * V,
                               state + unit * K * V,
                               out + values,
                               T,
                               K,
                               V,
                               H * K,
                               H * V,
                               row,
                               a_key,
                               scale_};
      loops_.head(head, scratch(static_cast<size_t>(loops_.scratch(K))));
    });
  }

 private:
  Node node_;
  const LinearLoops& loops_;
  int64_t heads_;
  float scale_;
};

const Registered<LinearRecurrence> registered;

}  // namespace
}  // namespace xexport
