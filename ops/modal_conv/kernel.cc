// xexport::modal_conv: (packed [B,T,3D], poles, residues [N,2,D], skip [D], state [B,N,2,D])
//                      -> (y [B,T,D], new_state [B,N,2,D]).
// The definition is reference.py; the arithmetic is in loops.cc. One unit of work is a block of channels.
#include <algorithm>
#include <cstring>

#include "../native/operator.h"
#include "loops.h"

namespace xexport {
namespace {

using ort::Element;

class ModalConvKernel {
 public:
  static constexpr const char* kName = "modal_conv";
  static constexpr Element kInputs[] = {Element::f32, Element::f32, Element::f32, Element::f32, Element::f32};
  static constexpr Element kOutputs[] = {Element::f32, Element::f32};
  static constexpr int kInPlace[] = {4, 1};
  static void infer(ort::ShapeContext* context) { infer_like(context, 4, 1, 4); }

  ModalConvKernel(const Node& node, Isa isa) : node_(node), loops_(modal_conv_loops(isa)) {}

  void compute(const Call& call) const {
    static constexpr const char* kNames[] = {"packed", "poles", "residues", "skip", "state"};
    Tensor in[5];
    for (size_t i = 0; i < 5; ++i) in[i] = call.input(i, kNames[i]);
    node_.expect(in[3], Element::f32, {-1});
    const int64_t D = in[3].dim[0];
    node_.expect(in[0], Element::f32, {-1, -1, 3 * D});
    const int64_t B = in[0].dim[0], T = in[0].dim[1];
    node_.expect(in[1], Element::f32, {-1, 2, D});
    const int64_t N = in[1].dim[0];
    node_.expect(in[2], Element::f32, {N, 2, D});
    node_.expect(in[4], Element::f32, {B, N, 2, D});
    const int64_t shape[] = {B, T, D};
    float* y = call.output(0, shape, 3).floats();
    float* state = call.output(1, in[4].dim, 4).floats();
    const float* before = in[4].floats();
    const int64_t size = 2 * N * D;
    if (T == 0) {
      if (state != before) std::memcpy(state, before, static_cast<size_t>(B * size) * sizeof(float));
      return;
    }
    const int64_t units = (D + kModalChannels - 1) / kModalChannels;
    const double work = static_cast<double>(B * T) * static_cast<double>(size) / 2;
    call.parallel(B * units, work, [&](int64_t unit) {
      const int64_t b = unit / units, first = unit % units * kModalChannels;
      const ModalConv conv = {in[0].floats() + b * T * 3 * D,
                              in[1].floats(),
                              in[2].floats(),
                              in[3].floats(),
                              before + b * size,
                              state + b * size,
                              y + b * T * D,
                              T,
                              D,
                              N};
      const int64_t last = std::min(first + kModalChannels, D);
      loops_.run(conv, first, last, scratch(static_cast<size_t>(loops_.scratch(N))));
    });
  }

 private:
  Node node_;
  const ModalConvLoops& loops_;
};

const Registered<ModalConvKernel> registered;

}  // namespace
}  // namespace xexport
