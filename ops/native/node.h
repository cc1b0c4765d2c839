// What a kernel sees of its node and of one call: tensors, checked, and the runtime's thread pool.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "ort_abi.h"
#include "team.h"

namespace xexport {

// The function table of the runtime that registered the library.
const ort::Api* api();
// Whether `api()` has kTensorShape.
bool has_shape_slot();

// An error that ONNX Runtime itself reported.
struct StatusError {
  ort::Status* status;
};
inline void check(ort::Status* status) {
  if (status != nullptr) throw StatusError{status};
}

// A tensor of the caller: shape, and a pointer to memory that the runtime owns.
struct Tensor {
  static constexpr size_t kMaxRank = 8;
  const char* name = "";
  ort::Element type = ort::Element::undefined;
  size_t rank = 0;
  int64_t dim[kMaxRank] = {};
  void* data = nullptr;

  float* floats() const { return static_cast<float*>(data); }
  int64_t count() const;  // of its numbers
  size_t bytes() const;   // 0 of an undefined type
  std::string describe() const;  // "float32 [1,2,3]"
};

// A node of the graph, as it is known when its kernel is made.
class Node {
 public:
  Node(const char* op, const ort::KernelInfo* info);
  // A node that is a part of another one (ops/sequence): its attributes are those of the whole that begin with
  // `prefix`; its inputs have these numbers among those of the whole, whose constants are given; inputs beyond them
  // are made inside. Both live as long as the kernel.
  Node(const Node& whole, const char* op, std::string prefix, std::vector<size_t> inputs,
       const std::vector<Tensor>& constants);

  // An attribute; its absence is an error, as the exporter writes all of them.
  int64_t integer(const char* attribute) const;
  float real(const char* attribute) const;
  // A list of integers, or of floats; its absence is an error.
  std::vector<int64_t> integers(const char* attribute) const;
  std::vector<float> numbers(const char* attribute) const;
  // The tensor of an input that is an initializer which no caller can replace; else its data is null. The
  // runtime keeps it as long as the kernel.
  Tensor constant(size_t input, const char* name) const;
  // Whether the input is an initializer that no caller can replace.
  bool is_constant(size_t input) const;
  // Throws an error that names the node.
  [[noreturn]] void fail(const std::string& what) const;
  // Fails unless the tensor is of this type and shape; a negative dimension stands for any.
  void expect(const Tensor& tensor, ort::Element type, std::initializer_list<int64_t> shape) const;

 private:
  std::string full(const char* attribute) const { return prefix_ + attribute; }

  std::string where_;
  const ort::KernelInfo* info_;  // valid in the constructor of a kernel only
  std::string prefix_;
  std::vector<size_t> inputs_;                       // of a part
  const std::vector<Tensor>* constants_ = nullptr;  // of the whole
};

// Where a kernel's tensors are if its node is a part of another one.
class Part {
 public:
  virtual size_t input_count() const = 0;
  virtual Tensor input(size_t index) const = 0;
  virtual Tensor output(size_t index, const int64_t* dims, size_t rank) const = 0;

 protected:
  ~Part() = default;
};

// One run of a kernel.
class Call {
 public:
  explicit Call(ort::KernelContext* context) : context_(context) {}
  // The same run, of a part of its node; on the threads of a team, if it has one.
  Call(const Call& whole, const Part& part, Team* team) : context_(whole.context_), part_(&part), team_(team) {}

  size_t input_count() const;
  Tensor input(size_t index, const char* name) const;
  Tensor output(size_t index, const int64_t* dims, size_t rank) const;

  // Runs `body` with a team of the session's threads.
  template <class Body>
  void together(Team& team, Body&& body) const {
    team.run(context_, std::forward<Body>(body));
  }

  // Runs job(0) .. job(count - 1), on the session's threads if the work is worth waking them.
  // `work` is an estimate in elementary operations.
  template <class Body>
  void parallel(int64_t count, double work, Body&& job) const {
    if (count <= 1 || work < (team_ != nullptr ? kWorthwhileInTeam : kWorthwhile)) {
      for (int64_t i = 0; i < count; ++i) job(i);
      return;
    }
    struct Shared {
      std::remove_reference_t<Body>* job;
      bool failed;
    } shared{&job, false};
    // No exception may cross the runtime's frames. The only one a job can raise is for lack of memory;
    // every writer of the flag writes the same value.
    auto run = [](void* user, size_t index) {
      auto* s = static_cast<Shared*>(user);
      try {
        (*s->job)(static_cast<int64_t>(index));
      } catch (...) {
        __atomic_store_n(&s->failed, true, __ATOMIC_RELAXED);
      }
    };
    if (team_ != nullptr) {
      team_->share(run, &shared, static_cast<size_t>(count));
    } else {
      check(ort::kParallelFor(api(), context_, run, static_cast<size_t>(count), 0, &shared));
    }
    if (shared.failed) throw std::runtime_error("not enough memory");
  }

 private:
  static constexpr double kWorthwhile = 200e3;  // some 20 us; waking a thread costs about 5 us
  static constexpr double kWorthwhileInTeam = 40e3;
  ort::KernelContext* context_;
  const Part* part_ = nullptr;
  Team* team_ = nullptr;
};

// The work of a recurrence with so many numbers of state, each taking `operations` for a token. Of one token it is the
// state that takes the time, read from memory and written to it.
inline double work_of_states(int64_t numbers, int64_t tokens, double operations) {
  return static_cast<double>(numbers) * (operations * static_cast<double>(tokens) + 2 * sizeof(float));
}

// Shape inference: output `to` is shaped as input `from`, if that is known to be of this rank.
void infer_like(ort::ShapeContext* context, size_t from, size_t to, size_t rank);

// Shape inference: the first dimension of an input, and an attribute; -1 if that is not known.
int64_t inferred_first(ort::ShapeContext* context, size_t input);
int64_t inferred_integer(ort::ShapeContext* context, const char* attribute);

// Shape inference: output `to` is float32, shaped as input `like` but for its last dimension, `columns`; nothing is
// said if that is negative.
void infer_columns(ort::ShapeContext* context, size_t like, int64_t columns, size_t to);

// Memory of this thread for intermediate results, aligned to a cache line; it grows and is reused, so it is
// valid until the next call on the same thread only. A kernel whose jobs use it may keep what they share in
// another one (`which` = 1), as they run on its own thread too.
float* scratch(size_t floats, int which = 0);

}  // namespace xexport
