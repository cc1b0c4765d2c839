// xexport::selective_scan: (u, dt [B,T,D], A [D,N], B, C [B,T,N], D [D], state [B,D,N])
//                          -> (y [B,T,D], new_state [B,D,N]).
// The definition is reference.py; the arithmetic is in loops.cc. One unit of work is a block of channels.
#include <algorithm>
#include <cstring>
#include <thread>

#include "../native/operator.h"
#include "loops.h"

namespace xexport {
namespace {

using ort::Element;

class SelectiveScanKernel {
 public:
  static constexpr const char* kName = "selective_scan";
  static constexpr Element kInputs[] = {Element::f32, Element::f32, Element::f32, Element::f32,
                                        Element::f32, Element::f32, Element::f32};
  static constexpr Element kOutputs[] = {Element::f32, Element::f32};
  static constexpr int kInPlace[] = {6, 1};
  static void infer(ort::ShapeContext* context) {
    infer_like(context, 0, 0, 3);
    infer_like(context, 6, 1, 3);
  }

  SelectiveScanKernel(const Node& node, Isa isa) : node_(node), loops_(selective_scan_loops(isa)) {}

  void compute(const Call& call) const {
    static constexpr const char* kNames[] = {"u", "dt", "A", "B", "C", "D", "state"};
    Tensor in[7];
    for (size_t i = 0; i < 7; ++i) in[i] = call.input(i, kNames[i]);
    node_.expect(in[0], Element::f32, {-1, -1, -1});
    node_.expect(in[2], Element::f32, {in[0].dim[2], -1});
    const int64_t B = in[0].dim[0], T = in[0].dim[1], D = in[0].dim[2], N = in[2].dim[1];
    node_.expect(in[1], Element::f32, {B, T, D});
    node_.expect(in[3], Element::f32, {B, T, N});
    node_.expect(in[4], Element::f32, {B, T, N});
    node_.expect(in[5], Element::f32, {D});
    node_.expect(in[6], Element::f32, {B, D, N});
    float* y = call.output(0, in[0].dim, 3).floats();
    float* state = call.output(1, in[6].dim, 3).floats();
    const float* before = in[6].floats();
    if (T == 0) {
      if (state != before) std::memcpy(state, before, static_cast<size_t>(B * D * N) * sizeof(float));
      return;
    }
    const int64_t width = channels_together(D), units = (D + width - 1) / width;
    const double work = 3.0 * static_cast<double>(B * T) * static_cast<double>(D * N);
    call.parallel(B * units, work, [&](int64_t unit) {
      const int64_t b = unit / units, first = unit % units * width;
      const SelectiveScan scan = {in[0].floats() + b * T * D,
                                  in[1].floats() + b * T * D,
                                  in[2].floats(),
                                  in[3].floats() + b * T * N,
                                  in[4].floats() + b * T * N,
                                  in[5].floats(),
                                  before + b * D * N,
                                  state + b * D * N,
                                  y + b * T * D,
                                  T,
                                  D,
                                  N};
      const int64_t last = std::min(first + width, D);
      loops_.run(scan, first, last, scratch(static_cast<size_t>(loops_.scratch(N))));
    });
  }

 private:
  // Rows of tokens are read in long pieces, if every thread gets one: as a session doesn't say how many
  // threads it has, there are as many pieces as processors, or a multiple.
  static int64_t channels_together(int64_t channels) {
    static const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
    constexpr int64_t kStep = 64;  // whole vectors of every instruction set
    const int64_t least = (channels + kScanChannels - 1) / kScanChannels;
    const int64_t pieces = (least + processors - 1) / processors * processors;
    return std::max<int64_t>(1, (channels + pieces * kStep - 1) / (pieces * kStep)) * kStep;
  }

  Node node_;
  const SelectiveScanLoops& loops_;
};

const Registered<SelectiveScanKernel> registered;

}  // namespace
}  // namespace xexport
