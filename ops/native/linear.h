// The kernel of every matrix product: checks, activations quantized once, and who computes what.
//
// A format has
//   static constexpr const char* kName;
//   static constexpr ort::Element kTypes[];            of (x, weights) or (x, weights, scales)
//   static const ProductLoops& loops(Isa);
//   static int64_t columns(ort::ShapeContext*);          of the result, or -1 if that is not known
//   Format(const Node&);                                 reads attributes
//   Product task(const Node&, const Tensor* in) const;   checks the weights, and fills what they determine
//   static double bytes(const Product&);                 of the weights
#pragma once

#include <algorithm>
#include <thread>

#include "operator.h"
#include "products.h"

namespace xexport {

template <class Format>
class Linear {
 public:
  static constexpr const char* kName = Format::kName;
  static constexpr const auto& kInputs = Format::kTypes;
  static constexpr ort::Element kOutputs[] = {ort::Element::f32};
  static constexpr int kInPlace[] = {-1, -1};
  static void infer(ort::ShapeContext* context) { infer_columns(context, 0, Format::columns(context), 0); }

  Linear(const Node& node, Isa isa) : node_(node), format_(node), loops_(Format::loops(isa)) {}

  void compute(const Call& call) const {
    static constexpr const char* kNames[] = {"x", "weight", "scales"};
    Tensor in[std::size(kInputs)];
    for (size_t i = 0; i < std::size(kInputs); ++i) in[i] = call.input(i, kNames[i]);
    Product task = format_.task(node_, in);
    const Tensor& x = in[0];
    if (x.type != ort::Element::f32 || x.rank < 1 || x.rank > Tensor::kMaxRank || x.dim[x.rank - 1] != task.depth) {
      node_.fail("x must be float32 [...," + std::to_string(task.depth) + "], got " + x.describe());
    }
    int64_t dims[Tensor::kMaxRank];
    task.tokens = 1;
    for (size_t i = 0; i < x.rank; ++i) {
      dims[i] = x.dim[i];
      if (i + 1 < x.rank) task.tokens *= x.dim[i];
    }
    dims[x.rank - 1] = task.columns;
    task.x = x.floats();
    task.y = call.output(0, dims, x.rank).floats();
    if (task.tokens == 0 || task.columns == 0) return;
    // a long prompt in parts whose activations stay in the cache while all weights pass by
    const int64_t tokens = task.tokens;
    const auto* x_first = task.x;
    auto* y_first = task.y;
    for (int64_t t = 0; t < tokens; t += kTokensAtOnce) {
      task.tokens = std::min(kTokensAtOnce, tokens - t);
      task.x = x_first + t * task.depth;
      task.y = y_first + t * task.columns;
      if (loops_.quantize != nullptr) quantize(call, task);
      multiply(call, task);
    }
  }

 private:
  static constexpr int64_t kTokensAtOnce = 1024;
  static constexpr int64_t kQuantizedAtOnce = 8;  // tokens
  // Bytes of weights of a job, where they are what takes the time: its four streams are long enough for the
  // processor to follow, and it is worth waking a thread.
  static constexpr double kJobBytes = 1 << 18, kLeastJobBytes = 1 << 15;
  static constexpr int64_t kManyJobs = 8;
  static constexpr int64_t kTokensOfTile = 96;

  void quantize(const Call& call, Product& task) const {
    const int64_t row = loops_.row_bytes(task.blocks, task.block), numbers = task.tokens * task.blocks;
    float* memory = scratch(static_cast<size_t>(2 * numbers + (task.tokens * row + 3) / 4 + 64), 1);
    auto* codes = reinterpret_cast<uint8_t*>(memory);
    auto* scales = reinterpret_cast<float*>(codes + task.tokens * row);
    auto* offsets = reinterpret_cast<int32_t*>(scales + numbers);
    const int64_t jobs = (task.tokens + kQuantizedAtOnce - 1) / kQuantizedAtOnce;
    call.parallel(jobs, static_cast<double>(task.tokens * task.depth), [&](int64_t job) {
      const int64_t end = std::min(task.tokens, (job + 1) * kQuantizedAtOnce);
      for (int64_t t = job * kQuantizedAtOnce; t < end; ++t) {
        loops_.quantize(task.x + t * task.depth, task.depth, task.blocks, task.block, codes + t * row,
                        scales + t * task.blocks, offsets + t * task.blocks);
      }
    });
    task.quantized = {codes, row, scales, offsets};
  }

  // As many jobs for each core, so that all end at the same time.
  static int64_t jobs_of(double bytes) {
    static const int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
    const auto most = static_cast<int64_t>(bytes / kLeastJobBytes);
    const int64_t rounds = 1 + static_cast<int64_t>(bytes / (kJobBytes * static_cast<double>(cores)));
    return std::max<int64_t>(1, std::min(cores * rounds, most));
  }

  void multiply(const Call& call, const Product& task) const {
    const auto room = static_cast<size_t>(loops_.scratch(task));
    const double bytes = Format::bytes(task), columns = static_cast<double>(task.columns);
    if (task.tokens < loops_.many) {
      const int64_t groups = (task.columns + loops_.group - 1) / loops_.group;
      const int64_t at_once = (groups + jobs_of(bytes) - 1) / jobs_of(bytes);
      const int64_t step = at_once * loops_.group;
      call.parallel((groups + at_once - 1) / at_once, bytes * static_cast<double>(task.tokens), [&](int64_t job) {
        const int64_t last = std::min(task.columns, (job + 1) * step);
        loops_.rows(task, job * step, last, room > 0 ? scratch(room) : nullptr);
      });
      return;
    }
    const int64_t panels = (task.columns + loops_.panel - 1) / loops_.panel;
    int64_t pieces = 1;
    if (panels < kManyJobs) pieces = std::max<int64_t>(1, std::min(kManyJobs / panels, task.tokens / kTokensOfTile));
    const int64_t piece = (task.tokens + pieces - 1) / pieces;
    const double work = static_cast<double>(task.tokens * task.depth) * columns / 16;
    call.parallel(panels * pieces, work, [&](int64_t job) {
      const int64_t begin = job / panels * piece, end = std::min(task.tokens, begin + piece);
      if (begin < end) loops_.tile(task, job % panels * loops_.panel, begin, end, scratch(room));
    });
  }

  Node node_;
  Format format_;
  const ProductLoops& loops_;
};

}  // namespace xexport
