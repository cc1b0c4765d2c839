#include "node.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace xexport {
namespace {

const char* element_name(ort::Element type) {
  static const char* const kNames[] = {"undefined", "float32", "uint8",   "int8",  "uint16",  "int16",
                                       "int32",     "int64",   "string",  "bool",  "float16", "float64",
                                       "uint32",    "uint64",  "complex64", "complex128", "bfloat16"};
  const auto index = static_cast<size_t>(type);
  return index < sizeof(kNames) / sizeof(*kNames) ? kNames[index] : "another type";
}

std::string shape_text(const int64_t* dims, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) {
    text += (i > 0 ? "," : "") + (dims[i] < 0 ? std::string("any") : std::to_string(dims[i]));
  }
  return text + "]";
}

void read_shape(const ort::Value* value, Tensor& tensor) {
  if (has_shape_slot()) {
    const int64_t* dims = nullptr;
    check(ort::kTensorShape(api(), value, &tensor.type, &dims, &tensor.rank));
    for (size_t i = 0; i < tensor.rank && i < Tensor::kMaxRank; ++i) tensor.dim[i] = dims[i];
    return;
  }
  ort::TensorInfo* info = nullptr;
  check(ort::kTensorInfo(api(), value, &info));
  const auto release = [](ort::TensorInfo* p) { ort::kReleaseTensorInfo(api(), p); };
  std::unique_ptr<ort::TensorInfo, decltype(release)> owner(info, release);
  check(ort::kInfoElement(api(), info, &tensor.type));
  check(ort::kInfoRank(api(), info, &tensor.rank));
  if (tensor.rank <= Tensor::kMaxRank) check(ort::kInfoDimensions(api(), info, tensor.dim, tensor.rank));
}

}  // namespace

int64_t Tensor::count() const {
  int64_t count = 1;
  for (size_t i = 0; i < rank && i < kMaxRank; ++i) count *= dim[i];
  return count;
}

size_t Tensor::bytes() const {
  size_t one = 0;
  switch (type) {
    case ort::Element::undefined: break;
    case ort::Element::u8: one = 1; break;
    case ort::Element::f16: one = 2; break;
    case ort::Element::f32: one = 4; break;
    case ort::Element::i64: one = 8; break;
  }
  return rank > kMaxRank ? 0 : one * static_cast<size_t>(count());
}

std::string Tensor::describe() const {
  if (rank > kMaxRank) return std::string(element_name(type)) + " of rank " + std::to_string(rank);
  return std::string(element_name(type)) + " " + shape_text(dim, rank);
}

Node::Node(const char* op, const ort::KernelInfo* info) : info_(info) {
  size_t size = 0;
  check(ort::kNodeName(api(), info, nullptr, &size));
  std::string name(size, '\0');
  check(ort::kNodeName(api(), info, name.data(), &size));
  where_ = "xexport " + std::string(op) + " node '" + name.c_str() + "': ";
}

Node::Node(const Node& whole, const char* op, std::string prefix, std::vector<size_t> inputs,
           const std::vector<Tensor>& constants)
    : where_(whole.where_ + op + ": "), info_(whole.info_), prefix_(std::move(prefix)), inputs_(std::move(inputs)),
      constants_(&constants) {}

int64_t Node::integer(const char* attribute) const {
  int64_t value = 0;
  if (ort::Status* status = ort::kAttributeInt(api(), info_, full(attribute).c_str(), &value)) {
    ort::kReleaseStatus(api(), status);
    fail("the attribute " + std::string(attribute) + " is missing");
  }
  return value;
}

float Node::real(const char* attribute) const {
  float value = 0;
  if (ort::Status* status = ort::kAttributeFloat(api(), info_, full(attribute).c_str(), &value)) {
    ort::kReleaseStatus(api(), status);
    fail("the attribute " + std::string(attribute) + " is missing");
  }
  return value;
}

std::vector<int64_t> Node::integers(const char* attribute) const {
  size_t count = 0;
  if (ort::Status* status = ort::kAttributeInts(api(), info_, full(attribute).c_str(), nullptr, &count)) {
    ort::kReleaseStatus(api(), status);
    fail("the attribute " + std::string(attribute) + " is missing");
  }
  std::vector<int64_t> values(count);
  if (count > 0) check(ort::kAttributeInts(api(), info_, full(attribute).c_str(), values.data(), &count));
  return values;
}

std::vector<float> Node::numbers(const char* attribute) const {
  size_t count = 0;
  if (ort::Status* status = ort::kAttributeFloats(api(), info_, full(attribute).c_str(), nullptr, &count)) {
    ort::kReleaseStatus(api(), status);
    fail("the attribute " + std::string(attribute) + " is missing");
  }
  std::vector<float> values(count);
  if (count > 0) check(ort::kAttributeFloats(api(), info_, full(attribute).c_str(), values.data(), &count));
  return values;
}

Tensor Node::constant(size_t input, const char* name) const {
  Tensor tensor;
  if (constants_ != nullptr) {
    if (input < inputs_.size() && inputs_[input] < constants_->size()) tensor = (*constants_)[inputs_[input]];
    tensor.name = name;
    return tensor;
  }
  int is_one = 0;
  const ort::Value* value = nullptr;
  tensor.name = name;
  check(ort::kConstantInput(api(), info_, input, &is_one, &value));
  if (is_one == 0 || value == nullptr) return tensor;
  read_shape(value, tensor);
  check(ort::kTensorData(api(), const_cast<ort::Value*>(value), &tensor.data));
  return tensor;
}

bool Node::is_constant(size_t input) const { return constant(input, "").data != nullptr; }

void Node::fail(const std::string& what) const { throw std::runtime_error(where_ + what); }

void Node::expect(const Tensor& tensor, ort::Element type, std::initializer_list<int64_t> shape) const {
  bool same = tensor.type == type && tensor.rank == shape.size();
  const int64_t* wanted = shape.begin();
  for (size_t i = 0; same && i < shape.size(); ++i) same = wanted[i] < 0 || wanted[i] == tensor.dim[i];
  if (same) return;
  fail(std::string(tensor.name) + " must be " + element_name(type) + " " +
       shape_text(wanted, shape.size()) + ", got " + tensor.describe());
}

size_t Call::input_count() const {
  if (part_ != nullptr) return part_->input_count();
  size_t count = 0;
  check(ort::kInputCount(api(), context_, &count));
  return count;
}

Tensor Call::input(size_t index, const char* name) const {
  Tensor tensor;
  if (part_ != nullptr) {
    tensor = part_->input(index);
    tensor.name = name;
    return tensor;
  }
  const ort::Value* value = nullptr;
  check(ort::kInput(api(), context_, index, &value));
  tensor.name = name;
  if (value == nullptr) return tensor;  // of undefined type: expect() refuses it
  read_shape(value, tensor);
  check(ort::kTensorData(api(), const_cast<ort::Value*>(value), &tensor.data));
  return tensor;
}

Tensor Call::output(size_t index, const int64_t* dims, size_t rank) const {
  if (part_ != nullptr) return part_->output(index, dims, rank);
  ort::Value* value = nullptr;
  check(ort::kOutput(api(), context_, index, dims, rank, &value));
  if (value == nullptr) throw std::runtime_error("xexport kernel: the runtime gave no output buffer");
  Tensor tensor;
  check(ort::kTensorData(api(), value, &tensor.data));
  return tensor;
}

void infer_like(ort::ShapeContext* context, size_t from, size_t to, size_t rank) {
  ort::TensorInfo* info = nullptr;
  check(ort::kInferInput(api(), context, from, &info));
  size_t known = 0;
  check(ort::kInfoRank(api(), info, &known));
  // an input of unknown rank looks like a scalar
  if (known == rank) check(ort::kInferOutput(api(), context, to, info));
}

int64_t inferred_first(ort::ShapeContext* context, size_t input) {
  ort::TensorInfo* info = nullptr;
  check(ort::kInferInput(api(), context, input, &info));
  size_t rank = 0;
  check(ort::kInfoRank(api(), info, &rank));
  if (rank < 1 || rank > Tensor::kMaxRank) return -1;
  int64_t dims[Tensor::kMaxRank];
  check(ort::kInfoDimensions(api(), info, dims, rank));
  return dims[0];
}

int64_t inferred_integer(ort::ShapeContext* context, const char* attribute) {
  const ort::OpAttribute* found = nullptr;
  int64_t value = -1;
  size_t size = 0;
  ort::Status* status = ort::kInferAttribute(api(), context, attribute, &found);
  if (status == nullptr) status = ort::kReadAttribute(api(), found, ort::kAttributeIsInt, &value, sizeof(value), &size);
  if (status == nullptr) return value;
  ort::kReleaseStatus(api(), status);  // the kernel says what is missing
  return -1;
}

void infer_columns(ort::ShapeContext* context, size_t like, int64_t columns, size_t to) {
  ort::TensorInfo* x = nullptr;
  check(ort::kInferInput(api(), context, like, &x));
  size_t rank = 0;
  check(ort::kInfoRank(api(), x, &rank));
  if (columns < 0 || rank < 1 || rank > Tensor::kMaxRank) return;
  int64_t dims[Tensor::kMaxRank];
  const char* symbols[Tensor::kMaxRank];
  check(ort::kInfoDimensions(api(), x, dims, rank));
  check(ort::kInfoSymbols(api(), x, symbols, rank));
  dims[rank - 1] = columns;
  symbols[rank - 1] = "";
  ort::TensorInfo* made = nullptr;
  check(ort::kCreateInfo(api(), &made));
  const auto release = [](ort::TensorInfo* p) { ort::kReleaseTensorInfo(api(), p); };
  std::unique_ptr<ort::TensorInfo, decltype(release)> owner(made, release);
  check(ort::kSetElement(api(), made, ort::Element::f32));
  check(ort::kSetDimensions(api(), made, dims, rank));
  check(ort::kSetSymbols(api(), made, symbols, rank));
  check(ort::kInferOutput(api(), context, to, made));
}

float* scratch(size_t floats, int which) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  struct Slot {
    std::unique_ptr<float, Free> memory;
    size_t capacity = 0;
  };
  thread_local Slot slots[2];
  Slot& slot = slots[which];
  if (floats > slot.capacity) {
    const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
    slot.memory.reset();
    slot.capacity = 0;
    slot.memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!slot.memory) throw std::bad_alloc();
    slot.capacity = floats;
  }
  return slot.memory.get();
}

}  // namespace xexport
