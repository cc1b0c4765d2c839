// xexport::hyena_conv: (packed [B,T,3D], h [D,L], skip [D], cache [B,D,L], pos [1]; n1, n2)
//                      -> (y [B,T,D], new_cache [B,D,L]), pos + T <= L.
// The definition is reference.py. Some channels of a sequence at a time: the inputs are gated on their way into
// the cache's rows, these are convolved, and the results are gated on their way back.
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

    const ConvolutionTask task = {after, L, h.floats(), L, nullptr, T + kPadding, B, D, begin, end};
    const bool direct = T == 0 || convolution_.is_direct(begin, end);
    const auto how = direct ? CausalConvolution::Transform{} : convolution_.transform(call, task);
    for (int64_t b = 0; b < B; ++b) {
      if (after != cache.floats()) copy(call, cache.floats() + b * D * L, after + b * D * L, D, begin, end, L);
      for (int64_t first = 0; first < D; first += kChannels) {
        const int64_t count = std::min(kChannels, D - first), row = b * D + first;
        const GatedChannels gated = {packed.floats() + b * T * 3 * D + first, skip.floats() + first,
                                     after + row * L + begin,                 nullptr,
                                     y + b * T * D + first,                   D,
                                     T,                                       count,
                                     L,                                       task.y_stride};
        channels(call, how, task, gated, b, first);
      }
    }
  }

 private:
  // At a time: few enough that what lies between the passes stays in a cache of the processor, enough that a
  // token's are read in long pieces. Whole groups of every instruction set.
  static constexpr int64_t kChannels = 256;
  static constexpr int64_t kPadding = 16;  // between rows, so that those of a power of two don't collide
  static constexpr int64_t kTokens = 64;   // of a unit of gating

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

  // Some channels of a sequence: in through the gate, convolved, and out through the other one.
  void channels(const Call& call, const CausalConvolution::Transform& how, const ConvolutionTask& task,
                GatedChannels gated, int64_t b, int64_t first) const {
    const int64_t count = gated.channels, length = gated.tokens, blocks = (length + kTokens - 1) / kTokens;
    const double size = static_cast<double>(count) * static_cast<double>(length);
    call.parallel(blocks, 2 * size, [&](int64_t block) { gates_.enter(tokens(gated, block)); });
    float* convolved = scratch(static_cast<size_t>(count * task.y_stride), 1);
    if (!how.plan) {
      call.parallel(count, size * static_cast<double>(task.end) / 4, [&](int64_t i) {
        const ConvolutionTask one = {task.u + (b * task.channels + first + i) * task.u_stride,
                                     task.u_stride,
                                     task.h + (first + i) * task.taps,
                                     task.taps,
                                     convolved + i * task.y_stride,
                                     task.y_stride,
                                     1,
                                     1,
                                     task.begin,
                                     task.end};
        convolution_.direct(one, 0);
      });
    } else {
      const int64_t lanes = convolution_.lanes();
      const auto floats = static_cast<size_t>(convolution_.scratch_size(how));
      call.parallel((count + lanes - 1) / lanes, 20 * size, [&](int64_t group) {
        convolution_.group(how, task, b, first / lanes + group, convolved + group * lanes * task.y_stride,
                           scratch(floats));
      });
    }
    gated.convolved = convolved;
    call.parallel(blocks, 3 * size, [&](int64_t block) { gates_.leave(tokens(gated, block)); });
  }

  // The block'th tokens of some channels.
  static GatedChannels tokens(GatedChannels x, int64_t block) {
    const int64_t at = block * kTokens;
    x.packed += at * 3 * x.width;
    x.cache += at;
    x.convolved += x.convolved == nullptr ? 0 : at;
    x.y += at * x.width;
    x.tokens = std::min(kTokens, x.tokens - at);
    return x;
  }

  // What the chunk doesn't write of a sequence's rows.
  static void copy(const Call& call, const float* from, float* to, int64_t rows, int64_t begin, int64_t end,
                   int64_t L) {
    call.parallel(rows, static_cast<double>(rows * L) / 4, [&](int64_t row) {
      const int64_t at = row * L;
      std::memcpy(to + at, from + at, static_cast<size_t>(begin) * sizeof(float));
      std::memcpy(to + at + end, from + at + end, static_cast<size_t>(L - end) * sizeof(float));
    });
  }

  Node node_;
  int64_t size_;
  CausalConvolution convolution_;
  const GateLoops& gates_;
};

const Registered<HyenaConv> registered;

}  // namespace
}  // namespace xexport
