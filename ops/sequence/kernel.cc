// xexport::sequence_<i>: the operators of a layer, one after another, as one node.
//
// A runtime spends some 5 us on every node beside its kernel, where a step streams weights through all caches: a
// tenth of a step of 180 nodes. What a part computes is its own kernel's business, bit for bit. Values between
// parts lie in memory of the thread that later parts use again, as the plan says.
//
// The kernel is the same for every i. The number tells apart the function bodies that a file carries for runtimes
// without this library.
#include <algorithm>
#include <cstdlib>
#include <new>

#include "../native/large_pages.h"
#include "../native/operator.h"
#include "plan.h"

namespace xexport {
namespace {

using ort::Element;

// A file has one function for every different row of operators.
constexpr int kNames = 32;
// Bytes of weights from which a team is worth it, some 20 us to read, and bytes of tokens up to which it is: with more
// of them a part takes long, and the runtime's own division of jobs is as good.
constexpr size_t kManyWeights = 262144, kFewTokens = 65536;
// Bytes of a weight from which it is worth fetching ahead.
constexpr size_t kLarge = 1024;
// Bytes that a thread keeps for its next call.
constexpr size_t kKept = size_t{64} << 20;

// Memory for values between parts; a thread has one for all its nodes, which run one after another.
class Memories {
 public:
  ~Memories() { release(); }

  // Of that many values what they are; what a node before has left there.
  std::vector<Tensor>& values(size_t count) {
    if (values_.size() < count) values_.resize(count);
    return values_;
  }

  float* get(size_t which, size_t bytes) {
    if (which >= slots_.size()) slots_.resize(which + 1);
    Slot& slot = slots_[which];
    if (bytes > slot.bytes) {
      std::free(slot.memory);
      total_ -= slot.bytes;
      slot = {nullptr, 0};
      const size_t rounded = (bytes + 63) / 64 * 64;
      slot.memory = std::aligned_alloc(64, rounded);
      if (slot.memory == nullptr) throw std::bad_alloc();
      slot.bytes = rounded;
      total_ += rounded;
    }
    return static_cast<float*>(slot.memory);
  }

  // After a long prompt a step needs little of it.
  void trim() {
    if (total_ > kKept) release();
  }

 private:
  struct Slot {
    void* memory = nullptr;
    size_t bytes = 0;
  };

  void release() {
    for (Slot& slot : slots_) {
      std::free(slot.memory);
      slot = {nullptr, 0};
    }
    total_ = 0;
  }

  std::vector<Slot> slots_;
  std::vector<Tensor> values_;
  size_t total_ = 0;
};

Memories& memories() {
  thread_local Memories mine;
  return mine;
}

class Sequence {
 public:
  static constexpr const char* kName = "sequence";
  static constexpr Element kInputs[] = {Element::undefined};  // any
  static constexpr Element kOutputs[] = {Element::f32};
  static constexpr int kInPlace[] = {-1, -1};
  static void infer(ort::ShapeContext*) {}

  Sequence(const Node& node, Isa isa) : node_(node), plan_(read(node)), constants_(plan_.inputs) {
    for (size_t i = 0; i < plan_.inputs; ++i) constants_[i] = node.constant(i, "weight");
    pages_.hold(constants_);
    for (size_t i = 0; i < plan_.parts.size(); ++i) {
      const SequencePart& part = plan_.parts[i];
      const Node inner(node, part.op.c_str(), "p" + std::to_string(i) + "_", part.inputs, constants_);
      Made made;
      if (part.op == SequencePlan::kReshape) {
        made.shape = inner.integers("shape");
        if (made.shape.empty() || made.shape.size() > Tensor::kMaxRank || part.inputs.size() != 1 ||
            part.places.size() != 1) {
          inner.fail("it has one input, one output and a shape");
        }
      } else {
        made.kernel = class_of(inner, part).make(inner, isa);
      }
      made_.push_back(std::move(made));
    }
    list_weights();
  }

  void compute(const Call& call) const {
    if (call.input_count() != plan_.inputs) {
      node_.fail("the plan has " + std::to_string(plan_.inputs) + " inputs, got " + std::to_string(call.input_count()));
    }
    if (ahead_.bytes() < kManyWeights || x_bytes(call) > kFewTokens) {
      run(call, nullptr);
      return;
    }
    Team team(ahead_);
    call.together(team, [&] { run(call, &team); });
  }

 private:
  struct Made {
    std::unique_ptr<AnyKernel> kernel;  // none of a reshape
    std::vector<int64_t> shape;
  };

  // One part's view of the values.
  class Step : public Part {
   public:
    Step(const Sequence& whole, const Call& call, const SequencePart& part, std::vector<Tensor>& values, size_t made)
        : whole_(whole), call_(call), part_(part), values_(values), made_(made) {}

    size_t input_count() const override { return part_.inputs.size(); }

    Tensor input(size_t index) const override {
      return index < part_.inputs.size() ? whole_.value(values_, part_.inputs[index]) : Tensor();
    }

    Tensor output(size_t index, const int64_t* dims, size_t rank) const override {
      if (index >= part_.places.size() || rank > Tensor::kMaxRank) {
        throw std::runtime_error("xexport kernel: a part of a sequence has an output more than its plan");
      }
      Tensor& made = values_[made_ + index];
      made.type = Element::f32;
      made.rank = rank;
      std::copy(dims, dims + rank, made.dim);
      const int64_t place = part_.places[index];
      made.data = place >= 0 ? call_.output(static_cast<size_t>(place), dims, rank).data
                             : memories().get(static_cast<size_t>(-1 - place), made.bytes());
      return made;
    }

   private:
    const Sequence& whole_;
    const Call& call_;
    const SequencePart& part_;
    std::vector<Tensor>& values_;
    size_t made_;
  };

  // Of the first part's first input: the tokens.
  size_t x_bytes(const Call& call) const {
    const size_t x = plan_.parts[0].inputs[0];
    return x < plan_.inputs && constants_[x].data == nullptr ? call.input(x, "input").bytes() : 0;
  }

  const Tensor& value(const std::vector<Tensor>& values, size_t i) const {
    return i < plan_.inputs && constants_[i].data != nullptr ? constants_[i] : values[i];
  }

  void run(const Call& call, Team* team) const {
    std::vector<Tensor>& values = memories().values(plan_.values);
    for (size_t i = 0; i < plan_.inputs; ++i) {
      if (constants_[i].data == nullptr) values[i] = call.input(i, "input");
    }
    size_t made = plan_.inputs;
    if (team != nullptr) team->will_read(0);
    for (size_t i = 0; i < plan_.parts.size(); ++i) {
      const SequencePart& part = plan_.parts[i];
      if (made_[i].kernel == nullptr) {
        reshape(value(values, part.inputs[0]), made_[i].shape, values[made]);
      } else {
        if (team != nullptr) team->will_read(i + 1);
        made_[i].kernel->compute(Call(call, Step(*this, call, part, values, made), team));
      }
      made += part.places.size();
    }
    memories().trim();
  }

  // What helpers fetch ahead: of every part the weights that are read from memory in each run.
  void list_weights() {
    for (const SequencePart& part : plan_.parts) {
      for (const size_t input : part.inputs) {
        if (input >= plan_.inputs || constants_[input].data == nullptr) continue;
        const size_t bytes = constants_[input].bytes();
        if (bytes >= kLarge) ahead_.add(constants_[input].data, bytes);
      }
      ahead_.end_part();
    }
  }

  static SequencePlan read(const Node& node) {
    try {
      return SequencePlan(node.integers("plan"));
    } catch (const std::runtime_error& error) {
      node.fail(error.what());
    }
  }

  // The class whose types are those of the constant inputs.
  const KernelClass& class_of(const Node& inner, const SequencePart& part) const {
    const auto [begin, end] = kernels().equal_range(part.op);
    if (begin == end || part.op == kName) inner.fail("no such operator can be a part of a sequence");
    for (auto it = begin; it != end; ++it) {
      const KernelClass& one = it->second;
      bool fits = one.numbered || part.inputs.size() == one.input_count;
      for (size_t i = 0; fits && !one.numbered && i < part.inputs.size(); ++i) {
        const size_t value = part.inputs[i];
        if (value < plan_.inputs && constants_[value].data != nullptr) fits = constants_[value].type == one.inputs[i];
      }
      if (fits) return one;
    }
    inner.fail("no kernel reads inputs of these numbers and types");
  }

  // The same numbers in another shape, of which a 0 is the dimension as it was and a -1 what is left.
  void reshape(const Tensor& from, const std::vector<int64_t>& shape, Tensor& to) const {
    const int64_t count = from.count();
    int64_t known = 1, open = -1;
    to = from;
    to.rank = shape.size();
    for (size_t i = 0; i < shape.size(); ++i) {
      const bool same = shape[i] == 0 && i < from.rank;
      to.dim[i] = same ? from.dim[i] : shape[i];
      if (shape[i] == -1) {
        open = static_cast<int64_t>(i);
      } else {
        known *= to.dim[i];
      }
    }
    if (open >= 0) to.dim[open] = known > 0 ? count / known : 0;
    if (known * (open >= 0 ? to.dim[open] : 1) != count) node_.fail("a shape does not fit " + from.describe());
  }

  Node node_;
  SequencePlan plan_;
  LargePages pages_;
  std::vector<Tensor> constants_;
  std::vector<Made> made_;
  Ahead ahead_;
};

const RegisteredNumbered<Sequence, kNames, true> registered;

}  // namespace
}  // namespace xexport
