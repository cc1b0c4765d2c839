// xexport::linear_group_<i>: products with constant weights that do not need each other's results, in one region of
// threads. Inputs are those of each product one after another, outputs one a product; `products` has four numbers of
// each: its format, K, N, and the block that shares a scale (0: none).
//
// The kernel is the same for every i. The number tells apart the function bodies that a file carries for runtimes
// without this library, as it does for fused_rows.
#include <memory>

#include "../linear/format.h"
#include "../linear_int4x8/format.h"
#include "../linear_int6x8/format.h"
#include "../linear_int8/format.h"

namespace xexport {
namespace {

using ort::Element;

// A file has one function for every different row of products.
constexpr int kNames = 32;

// Any format.
struct Weights {
  virtual ~Weights() = default;
  virtual Product task(const Node& node, const Tensor* in) const = 0;
  virtual double bytes(const Product& task) const = 0;
  virtual size_t inputs() const = 0;
  virtual const ProductLoops& loops(Isa isa) const = 0;
};

template <class Format>
struct Of : Weights, Format {
  Of(int64_t depth, int64_t columns, int64_t block) : Format(depth, columns, block) {}
  Product task(const Node& node, const Tensor* in) const override { return Format::task(node, in); }
  double bytes(const Product& task) const override { return Format::bytes(task); }
  size_t inputs() const override { return std::size(Format::kTypes); }
  const ProductLoops& loops(Isa isa) const override { return Format::loops(isa); }
};

// Numbers of the formats; exporter/passes/together.py has them too.
std::unique_ptr<Weights> weights_of(const Node& node, const int64_t* p) {
  switch (p[0]) {
    case 0: return std::make_unique<Of<Float<Element::f32>>>(p[1], p[2], p[3]);
    case 1: return std::make_unique<Of<Float<Element::f16>>>(p[1], p[2], p[3]);
    case 2: return std::make_unique<Of<Int8>>(p[1], p[2], p[3]);
    case 3: return std::make_unique<Of<Int4>>(p[1], p[2], p[3]);
    case 4: return std::make_unique<Of<Int6>>(p[1], p[2], p[3]);
    default: node.fail("no format of a product has the number " + std::to_string(p[0]));
  }
}

class LinearGroup {
 public:
  static constexpr const char* kName = "linear_group";
  static constexpr Element kInputs[] = {Element::undefined};  // any
  static constexpr Element kOutputs[] = {Element::f32};
  static constexpr int kInPlace[] = {-1, -1};
  static void infer(ort::ShapeContext*) {}

  LinearGroup(const Node& node, Isa isa) : node_(node) {
    const std::vector<int64_t> products = node.integers("products");
    if (products.empty() || products.size() % kNumbers != 0 || products.size() / kNumbers > kMostMultiplications) {
      node.fail("the attribute products must have four numbers of each of 1 to " +
                std::to_string(kMostMultiplications) + " products");
    }
    for (size_t i = 0; i < products.size(); i += kNumbers) {
      weights_.push_back(weights_of(node, &products[i]));
      loops_.push_back(&weights_.back()->loops(isa));
      inputs_ += weights_.back()->inputs();
    }
  }

  void compute(const Call& call) const {
    if (call.input_count() != inputs_) {
      node_.fail("its products have " + std::to_string(inputs_) + " inputs, got " + std::to_string(call.input_count()));
    }
    static constexpr const char* kNames[] = {"x", "weight", "scales"};
    Multiplication all[kMostMultiplications];
    size_t next = 0;
    for (size_t i = 0; i < weights_.size(); ++i) {
      Tensor in[std::size(kNames)];
      for (size_t k = 0; k < weights_[i]->inputs(); ++k) in[k] = call.input(next++, kNames[k]);
      all[i] = {loops_[i], weights_[i]->task(node_, in), 0};
      add_activations(node_, call, in[0], i, all[i].task);
      all[i].bytes = weights_[i]->bytes(all[i].task);
    }
    multiply(call, all, weights_.size());
  }

 private:
  static constexpr size_t kNumbers = 4;

  Node node_;
  std::vector<std::unique_ptr<Weights>> weights_;
  std::vector<const ProductLoops*> loops_;
  size_t inputs_ = 0;
};

const RegisteredNumbered<LinearGroup, kNames> registered;

}  // namespace
}  // namespace xexport
