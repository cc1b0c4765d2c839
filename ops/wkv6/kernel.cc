// xexport::wkv6: (r [B,T,H,N], w [B,T,H,N] or [1,1,H,N], k [B,T,H,N], v [B,T,H,M], u [H,N], state [B,H,N,M])
//                -> (y [B,T,H,M], new_state [B,H,N,M]).
// The definition is reference.py; the arithmetic is in loops.cc. One unit of work is one head.
#include <cstring>

#include "../native/operator.h"
#include "loops.h"

namespace xexport {
namespace {

using ort::Element;

class Wkv6Kernel {
 public:
  static constexpr const char* kName = "wkv6";
  static constexpr Element kInputs[] = {Element::f32, Element::f32, Element::f32,
                                        Element::f32, Element::f32, Element::f32};
  static constexpr Element kOutputs[] = {Element::f32, Element::f32};
  static constexpr int kInPlace[] = {5, 1};
  static void infer(ort::ShapeContext* context) {
    infer_like(context, 3, 0, 4);
    infer_like(context, 5, 1, 4);
  }

  Wkv6Kernel(const Node& node, Isa isa) : node_(node), loops_(wkv6_loops(isa)) {}

  void compute(const Call& call) const {
    static constexpr const char* kNames[] = {"r", "w", "k", "v", "u", "state"};
    Tensor in[6];
    for (size_t i = 0; i < 6; ++i) in[i] = call.input(i, kNames[i]);
    node_.expect(in[0], Element::f32, {-1, -1, -1, -1});
    const int64_t B = in[0].dim[0], T = in[0].dim[1], H = in[0].dim[2], N = in[0].dim[3];
    const bool same = in[1].rank == 4 && in[1].dim[0] == 1 && in[1].dim[1] == 1;  // for every token
    node_.expect(in[1], Element::f32, {same ? 1 : B, same ? 1 : T, H, N});
    node_.expect(in[2], Element::f32, {B, T, H, N});
    node_.expect(in[3], Element::f32, {B, T, H, -1});
    const int64_t M = in[3].dim[3];
    node_.expect(in[4], Element::f32, {H, N});
    node_.expect(in[5], Element::f32, {B, H, N, M});
    float* y = call.output(0, in[3].dim, 4).floats();
    float* state = call.output(1, in[5].dim, 4).floats();
    const float* before = in[5].floats();
    if (T == 0) {
      if (state != before) std::memcpy(state, before, static_cast<size_t>(B * H * N * M) * sizeof(float));
      return;
    }
    const double work = work_of_states(B * H * N * M, T, 3.0 / 8);
    call.parallel(B * H, work, [&](int64_t unit) {
      const int64_t b = unit / H, h = unit % H, keys = (b * T * H + h) * N, values = (b * T * H + h) * M;
      const Wkv6Head head = {in[0].floats() + keys,
                             in[1].floats() + (same ? h * N : keys),
                             in[2].floats() + keys,
                             in[3].floats() + values,
                             in[4].floats() + h * N,
                             before + unit * N * M,
                             state + unit * N * M,
                             y + values,
                             T,
                             N,
                             M,
                             H * N,
                             same ? 0 : H * N,
                             H * M};
      loops_.head(head);
    });
  }

 private:
  Node node_;
  const Wkv6Loops& loops_;
};

const Registered<Wkv6Kernel> registered;

}  // namespace
}  // namespace xexport
