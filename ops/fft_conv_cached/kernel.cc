// xexport::fft_conv_cached: (u [B,D,T], h [D,L], cache [B,D,L], pos [1]; n1, n2)
//                           -> (y [B,D,T], new_cache [B,D,L]), pos + T <= L.
// The definition is reference.py. Only the pos + T points so far take part: one token is a dot product with
// the reversed filter, more are one transform of that many points, whatever L is.
#include <cstring>

#include "../fft_conv/convolution.h"
#include "../native/operator.h"

namespace xexport {
namespace {

using ort::Element;

class FftConvCached {
 public:
  static constexpr const char* kName = "fft_conv_cached";
  static constexpr Element kInputs[] = {Element::f32, Element::f32, Element::f32, Element::i64};
  static constexpr Element kOutputs[] = {Element::f32, Element::f32};
  static constexpr int kInPlace[] = {2, 1};
  static void infer(ort::ShapeContext* context) {
    infer_like(context, 0, 0, 3);
    infer_like(context, 2, 1, 3);
  }

  FftConvCached(const Node& node, Isa isa)
      : node_(node), size_(node.integer("n1") * node.integer("n2")), convolution_(isa, node.is_constant(1)) {}

  void compute(const Call& call) const {
    const Tensor u = call.input(0, "u"), h = call.input(1, "h"), cache = call.input(2, "cache");
    const Tensor pos = call.input(3, "pos");
    node_.expect(u, Element::f32, {-1, -1, -1});
    const int64_t B = u.dim[0], D = u.dim[1], T = u.dim[2];
    node_.expect(h, Element::f32, {D, -1});
    const int64_t L = h.dim[1];
    node_.expect(cache, Element::f32, {B, D, L});
    node_.expect(pos, Element::i64, {1});
    const int64_t begin = *static_cast<const int64_t*>(pos.data);
    // T is at most a tensor's length, so the comparison can't overflow
    if (begin < 0 || begin > L - T) {
      node_.fail("a stream is longer than the filter: pos " + std::to_string(begin) + " and " + std::to_string(T) +
                 " tokens, a filter of " + std::to_string(L));
    }
    if (size_ < 2 * L) {
      node_.fail("a filter of " + std::to_string(L) + ", a transform of " + std::to_string(size_));
    }
    float* y = call.output(0, u.dim, 3).floats();
    float* after = call.output(1, cache.dim, 3).floats();
    const auto insert = [&](int64_t row) {
      float* to = after + row * L;
      const float* from = cache.floats() + row * L;
      if (to != from) {
        copy(to, from, begin);
        copy(to + begin + T, from + begin + T, L - begin - T);
      }
      copy(to + begin, u.floats() + row * T, T);
    };
    const ConvolutionTask task = {after, L, h.floats(), L, y, T, B, D, begin, begin + T};
    const auto rows = static_cast<double>(B * D);
    const double copied = rows * static_cast<double>(after == cache.floats() ? T : L) / 4;
    if (T == 0 || convolution_.is_direct(begin, begin + T)) {
      const double work = copied + rows * static_cast<double>(T * (begin + T)) / 4;
      call.parallel(B * D, work, [&](int64_t row) {
        insert(row);
        convolution_.direct(task, row);
      });
      return;
    }
    call.parallel(B * D, copied, insert);
    convolution_.transformed(call, task);
  }

 private:
  static void copy(float* to, const float* from, int64_t count) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  }

  Node node_;
  int64_t size_;
  CausalConvolution convolution_;
};

const Registered<FftConvCached> registered;

}  // namespace
}  // namespace xexport
