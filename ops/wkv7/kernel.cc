// xexport::wkv7: (r, w, k, v, a, b [B,T,H,N], state [B,H,N,N]) -> (y [B,T,H,N], new_state [B,H,N,N]).
// The definition is reference.py; the arithmetic is in loops.cc. One unit of work is one head, or a few.
#include <algorithm>
#include <cstring>
#include <thread>

#include "../native/operator.h"
#include "loops.h"

namespace xexport {
namespace {

using ort::Element;

class Wkv7 {
 public:
  static constexpr const char* kName = "wkv7";
  static constexpr Element kInputs[] = {Element::f32, Element::f32, Element::f32, Element::f32,
                                        Element::f32, Element::f32, Element::f32};
  static constexpr Element kOutputs[] = {Element::f32, Element::f32};
  static constexpr int kInPlace[] = {6, 1};
  static void infer(ort::ShapeContext* context) {
    infer_like(context, 3, 0, 4);
    infer_like(context, 6, 1, 4);
  }

  Wkv7(const Node& node, Isa isa) : node_(node), loops_(wkv7_loops(isa)) {}

  void compute(const Call& call) const {
    static constexpr const char* kNames[] = {"r", "w", "k", "v", "a", "b", "state"};
    Tensor in[7];
    for (size_t i = 0; i < 7; ++i) in[i] = call.input(i, kNames[i]);
    node_.expect(in[0], Element::f32, {-1, -1, -1, -1});
    const int64_t B = in[0].dim[0], T = in[0].dim[1], H = in[0].dim[2], N = in[0].dim[3];
    for (size_t i = 1; i < 6; ++i) node_.expect(in[i], Element::f32, {B, T, H, N});
    node_.expect(in[6], Element::f32, {B, H, N, N});
    float* y = call.output(0, in[0].dim, 4).floats();
    float* state = call.output(1, in[6].dim, 4).floats();
    const float* before = in[6].floats();
    if (T == 0) {
      if (state != before) std::memcpy(state, before, static_cast<size_t>(B * H * N * N) * sizeof(float));
      return;
    }
    const double work = work_of_states(B * H * N * N, T, 5.0 / 8);
    const int64_t group = heads_together(B * H, T), groups = (H + group - 1) / group;
    call.parallel(B * groups, work, [&](int64_t unit) {
      const int64_t b = unit / groups, first = unit % groups * group, many = std::min(group, H - first);
      Wkv7Head heads[kWkv7Heads];
      for (int64_t i = 0; i < many; ++i) {
        const int64_t at = (b * T * H + first + i) * N, cell = (b * H + first + i) * N * N;
        heads[i] = {in[0].floats() + at, in[1].floats() + at, in[2].floats() + at,
                    in[3].floats() + at, in[4].floats() + at, in[5].floats() + at,
                    before + cell,       state + cell,        y + at,
                    T,                   H * N,               N};
      }
      loops_.run(heads, many, scratch(static_cast<size_t>(loops_.scratch(N))));
    });
  }

 private:
  // Neighbours in memory are best done together, if every thread still gets some: as a session doesn't say
  // how many threads it has, a unit for each processor.
  static int64_t heads_together(int64_t heads, int64_t tokens) {
    static const int64_t processors = std::max(1u, std::thread::hardware_concurrency());
    return tokens == 1 ? 1 : std::clamp<int64_t>(heads / processors, 1, kWkv7Heads);
  }

  Node node_;
  const Wkv7Loops& loops_;
};

const Registered<Wkv7> registered;

}  // namespace
}  // namespace xexport
