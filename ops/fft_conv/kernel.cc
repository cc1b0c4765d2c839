// xexport::fft_conv: (u [B,D,S], h [D,L]; n1, n2) -> y [B,D,S], S <= L. The definition is reference.py.
// n1 * n2 >= 2 L is the size of the function body's transform; here it is checked and not used.
#include "../native/operator.h"
#include "convolution.h"

namespace xexport {
namespace {

using ort::Element;

class FftConv {
 public:
  static constexpr const char* kName = "fft_conv";
  static constexpr Element kInputs[] = {Element::f32, Element::f32};
  static constexpr Element kOutputs[] = {Element::f32};
  static constexpr int kInPlace[] = {-1, -1};
  static void infer(ort::ShapeContext* context) { infer_like(context, 0, 0, 3); }

  FftConv(const Node& node, Isa isa)
      : node_(node), size_(node.integer("n1") * node.integer("n2")), convolution_(isa, node.is_constant(1)) {}

  void compute(const Call& call) const {
    const Tensor u = call.input(0, "u"), h = call.input(1, "h");
    node_.expect(u, Element::f32, {-1, -1, -1});
    const int64_t B = u.dim[0], D = u.dim[1], S = u.dim[2];
    node_.expect(h, Element::f32, {D, -1});
    const int64_t L = h.dim[1];
    if (S > L || size_ < 2 * L) {
      node_.fail(std::to_string(S) + " points, a filter of " + std::to_string(L) + ", a transform of " +
                 std::to_string(size_));
    }
    float* y = call.output(0, u.dim, 3).floats();
    if (S == 0) return;
    const ConvolutionTask task = {u.floats(), S, h.floats(), L, y, S, B, D, 0, S};
    if (!convolution_.is_direct(0, S)) {
      convolution_.transformed(call, task);
      return;
    }
    const double work = static_cast<double>(B * D) * static_cast<double>(S * (S + 40)) / 4;
    call.parallel(B * D, work, [&](int64_t row) { convolution_.direct(task, row); });
  }

 private:
  Node node_;
  int64_t size_;
  CausalConvolution convolution_;
};

const Registered<FftConv> registered;

}  // namespace
}  // namespace xexport
