// xexport::hyena_conv: (packed [B,T,3D], h [D,L], skip [D], cache [B,D,L], pos [1]; n1, n2)
//                      -> (y [B,T,D], new_cache [B,D,L]), pos + T <= L.
// The definition is reference.py. A unit of work is a block of channels of a sequence: gate the inputs on their
// way into the cache's rows, convolve these, and gate the results on their way back, while they are in a cache
// of the processor.
#include <algorithm>
#include <cstring>

#include "../fft_conv/convolution.h"
#include "../native/operator.h"
#include "loops.h"

namespace xexport {
namespace {

using ort::Element;

class HyenaConv {
 public:
  static constexpr const char* kName = "hyena_conv";
  static constexpr Element kInputs[] = {Element::f32, Element::f32, Element::f32, Element::f32, Element::i64};
  static constexpr Element kOutputs[] = {Element::f32, Element::f32};
  static constexpr int kInPlace[] = {3, 1};
  static void infer(ort::ShapeContext* context) { infer_like(context, 3, 1, 3); }

  HyenaConv(const Node& node, Isa isa)
      : node_(node),
        size_(node.integer("n1") * node.integer("n2")),
        convolution_(isa, node.is_constant(1)),
        gates_(gate_loops(isa)) {}

  void compute(const Call& call) const {
    const Tensor packed = call.input(0, "packed"), h = call.input(1, "h"), skip = call.input(2, "skip");
    const Tensor cache = call.input(3, "cache"), pos = call.input(4, "pos");
    node_.expect(skip, Element::f32, {-1});
    const int64_t D = skip.dim[0];
    node_.expect(packed, Element::f32, {-1, -1, 3 * D});
    const int64_t B = packed.dim[0], T = packed.dim[1];
    node_.expect(h, Element::f32, {D, -1});
    const int64_t L = h.dim[1];
    node_.expect(cache, Element::f32, {B, D, L});
    node_.expect(pos, Element::i64, {1});
    const int64_t begin = *static_cast<const int64_t*>(pos.data), end = begin + T;
    check(begin, T, L);
    const int64_t shape[] = {B, T, D};
    float* y = call.output(0, shape, 3).floats();
    float* after = call.output(1, cache.dim, 3).floats();

    const int64_t blocks = (D + kChannels - 1) / kChannels, stride = T + kPadding;
    const ConvolutionTask task = {after, L, h.floats(), L, nullptr, stride, B, D, begin, end};
    const bool direct = T == 0 || convolution_.is_direct(begin, end);
    const auto how = direct ? CausalConvolution::Transform{} : convolution_.transform(call, task);
    const auto floats = static_cast<size_t>(kChannels * stride + (direct ? 0 : convolution_.scratch_size(how)));
    const auto outputs = static_cast<double>(B * D) * static_cast<double>(T);
    const double copied = after == cache.floats() ? 0 : static_cast<double>(B * D) * static_cast<double>(L) / 4;
    const double work = copied + outputs * (direct ? static_cast<double>(end) / 4 : 30);
    call.parallel(B * blocks, work, [&](int64_t unit) {
      const int64_t b = unit / blocks, first = unit % blocks * kChannels, count = std::min(kChannels, D - first);
      const int64_t row = b * D + first;
      if (after != cache.floats()) copy(cache.floats(), after, row, count, begin, end, L);
      float* convolved = scratch(floats);
      const GatedChannels gated = {packed.floats() + b * T * 3 * D + first, skip.floats() + first,
                                   after + row * L + begin,                 convolved,
                                   y + b * T * D + first,                   D,
                                   T,                                       count,
                                   L,                                       stride};
      gates_.enter(gated);
      convolve(how, task, b, first, count, convolved);
      gates_.leave(gated);
    });
  }

 private:
  static constexpr int64_t kChannels = 32;  // whole groups of every instruction set; 128 bytes of a token
  static constexpr int64_t kPadding = 16;   // between rows, so that those of a power of two don't collide

  void check(int64_t begin, int64_t T, int64_t L) const {
    // T is at most a tensor's length, so the comparison can't overflow
    if (begin < 0 || begin > L - T) {
      node_.fail("a stream is longer than the filter: pos " + std::to_string(begin) + " and " + std::to_string(T) +
                 " tokens, a filter of " + std::to_string(L));
    }
    if (size_ < 2 * L) {
      node_.fail("a filter of " + std::to_string(L) + ", a transform of " + std::to_string(size_));
    }
  }

  // Channels first .. first + count - 1 to the rows of `convolved`, behind which there is room to work in.
  void convolve(const CausalConvolution::Transform& how, const ConvolutionTask& task, int64_t b, int64_t first,
                int64_t count, float* convolved) const {
    if (!how.plan) {
      const int64_t row = b * task.channels + first;
      ConvolutionTask one = task;
      for (int64_t i = 0; i < count; ++i) {
        one.u = task.u + (row + i) * task.u_stride;
        one.h = task.h + (first + i) * task.taps;
        one.y = convolved + i * task.y_stride;
        convolution_.direct(one, 0);
      }
      return;
    }
    const int64_t lanes = convolution_.lanes();
    for (int64_t i = 0; i < count; i += lanes) {
      convolution_.group(how, task, b, (first + i) / lanes, convolved + i * task.y_stride,
                         convolved + kChannels * task.y_stride);
    }
  }

  // What the chunk doesn't write of some rows.
  static void copy(const float* from, float* to, int64_t row, int64_t count, int64_t begin, int64_t end, int64_t L) {
    for (int64_t i = row * L; i < (row + count) * L; i += L) {
      std::memcpy(to + i, from + i, static_cast<size_t>(begin) * sizeof(float));
      std::memcpy(to + i + end, from + i + end, static_cast<size_t>(L - end) * sizeof(float));
    }
  }

  Node node_;
  int64_t size_;
  CausalConvolution convolution_;
  const GateLoops& gates_;
};

const Registered<HyenaConv> registered;

}  // namespace
}  // namespace xexport
