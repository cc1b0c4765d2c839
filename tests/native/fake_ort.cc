#include "fake_ort.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>

namespace harness {
namespace {

namespace ort = xexport::ort;
constexpr size_t kSlots = 425;

ort::Status* failure(const std::string& text) { return reinterpret_cast<ort::Status*>(new Status{1, text}); }
template <class To, class From>
To* as(From* p) {
  return reinterpret_cast<To*>(const_cast<std::remove_const_t<From>*>(p));
}

ort::Status* create_status(int32_t code, const char* text) {
  return reinterpret_cast<ort::Status*>(new Status{code, text});
}
int32_t error_code(const ort::Status* s) { return as<Status>(s)->code; }
const char* error_message(const ort::Status* s) { return as<Status>(s)->text.c_str(); }
void release_status(ort::Status* s) { delete as<Status>(s); }

using Domain = std::vector<const ort::CustomOp*>;
ort::Status* create_domain(const char*, ort::CustomOpDomain** out) {
  *out = as<ort::CustomOpDomain>(new Domain);  // as in the runtime it lives as long as the process
  return nullptr;
}
ort::Status* add_operator(ort::CustomOpDomain* domain, const ort::CustomOp* op) {
  as<Domain>(domain)->push_back(op);
  return nullptr;
}
ort::Status* add_domain(ort::SessionOptions* options, ort::CustomOpDomain* domain) {
  as<Session>(options)->operators = *as<Domain>(domain);
  return nullptr;
}
ort::Status* has_config(const ort::SessionOptions* options, const char* key, int* out) {
  *out = as<Session>(options)->config.count(key) > 0 ? 1 : 0;
  return nullptr;
}

ort::Status* copy_text(const std::string& text, char* to, size_t* size) {
  const size_t room = *size;
  *size = text.size() + 1;
  if (to == nullptr) return nullptr;
  if (room < text.size() + 1) return failure("the buffer is too small");
  std::memcpy(to, text.c_str(), text.size() + 1);
  return nullptr;
}
ort::Status* get_config(const ort::SessionOptions* options, const char* key, char* to, size_t* size) {
  return copy_text(as<Session>(options)->config.at(key), to, size);
}
ort::Status* node_name(const ort::KernelInfo* info, char* to, size_t* size) {
  return copy_text(as<Node>(info)->name, to, size);
}

const Attribute* attribute(const ort::KernelInfo* info, const char* name, char kind) {
  for (const Attribute& a : as<Node>(info)->is->attributes) {
    if (a.name == name && a.kind == kind) return &a;
  }
  return nullptr;
}
ort::Status* attribute_int(const ort::KernelInfo* info, const char* name, int64_t* out) {
  const Attribute* a = attribute(info, name, 'i');
  if (a == nullptr) return failure("no such attribute");
  *out = a->integers.at(0);
  return nullptr;
}
ort::Status* attribute_float(const ort::KernelInfo* info, const char* name, float* out) {
  const Attribute* a = attribute(info, name, 'f');
  if (a == nullptr) return failure("no such attribute");
  *out = static_cast<float>(a->reals.at(0));
  return nullptr;
}
template <class From, class To>
ort::Status* copy_list(const std::vector<From>& from, To* to, size_t* count) {
  if (to != nullptr) {
    if (*count < from.size()) return failure("the buffer is too small");
    for (size_t i = 0; i < from.size(); ++i) to[i] = static_cast<To>(from[i]);
  }
  *count = from.size();
  return nullptr;
}
ort::Status* attribute_ints(const ort::KernelInfo* info, const char* name, int64_t* to, size_t* count) {
  const Attribute* a = attribute(info, name, 'i');
  return a == nullptr ? failure("no such attribute") : copy_list(a->integers, to, count);
}
ort::Status* attribute_floats(const ort::KernelInfo* info, const char* name, float* to, size_t* count) {
  const Attribute* a = attribute(info, name, 'f');
  return a == nullptr ? failure("no such attribute") : copy_list(a->reals, to, count);
}
ort::Status* attribute_text(const ort::KernelInfo* info, const char* name, char* to, size_t* size) {
  const Attribute* a = attribute(info, name, 's');
  return a == nullptr ? failure("no such attribute") : copy_text(a->text, to, size);
}
ort::Status* input_count(const ort::KernelInfo* info, size_t* out) {
  *out = as<Node>(info)->is->inputs.size();
  return nullptr;
}
ort::Status* output_count(const ort::KernelInfo* info, size_t* out) {
  *out = as<Node>(info)->is->outputs.size();
  return nullptr;
}
ort::Status* constant_input(const ort::KernelInfo* info, size_t index, int* constant, const ort::Value** out) {
  const Array& a = as<Node>(info)->is->inputs.at(index);
  *constant = a.constant ? 1 : 0;
  *out = a.constant ? as<const ort::Value>(&a) : nullptr;
  return nullptr;
}

ort::Status* tensor_data(ort::Value* value, void** out) {
  *out = as<Array>(value)->data.get();
  return nullptr;
}
ort::Status* tensor_info(const ort::Value* value, ort::TensorInfo** out) {
  const Array* a = as<Array>(value);
  *out = as<ort::TensorInfo>(new Info{a->element, a->dims});
  return nullptr;
}
void release_info(ort::TensorInfo* info) { delete as<Info>(info); }
ort::Status* info_element(const ort::TensorInfo* info, int32_t* out) {
  *out = as<Info>(info)->element;
  return nullptr;
}
ort::Status* info_rank(const ort::TensorInfo* info, size_t* out) {
  *out = as<Info>(info)->dims.size();
  return nullptr;
}
ort::Status* info_dims(const ort::TensorInfo* info, int64_t* to, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = as<Info>(info)->dims.at(i);
  return nullptr;
}
ort::Status* create_info(ort::TensorInfo** out) {
  *out = as<ort::TensorInfo>(new Info);
  return nullptr;
}
ort::Status* set_element(ort::TensorInfo* info, int32_t element) {
  as<Info>(info)->element = element;
  return nullptr;
}
ort::Status* set_dims(ort::TensorInfo* info, const int64_t* dims, size_t count) {
  as<Info>(info)->dims.assign(dims, dims + count);
  return nullptr;
}
// Every dimension of a case is a number.
ort::Status* info_symbols(const ort::TensorInfo*, const char** to, size_t count) {
  for (size_t i = 0; i < count; ++i) to[i] = "";
  return nullptr;
}
ort::Status* set_symbols(ort::TensorInfo*, const char**, size_t) { return nullptr; }
ort::Status* tensor_shape(const ort::Value* value, int32_t* element, const int64_t** dims, size_t* rank) {
  const Array* a = as<Array>(value);
  *element = a->element;
  *dims = a->dims.data();
  *rank = a->dims.size();
  return nullptr;
}

ort::Status* run_inputs(const ort::KernelContext* context, size_t* out) {
  *out = as<Run>(context)->inputs->size();
  return nullptr;
}
ort::Status* run_outputs(const ort::KernelContext* context, size_t* out) {
  *out = as<Run>(context)->output_count;
  return nullptr;
}
ort::Status* input(const ort::KernelContext* context, size_t index, const ort::Value** out) {
  *out = as<const ort::Value>(&as<Run>(context)->inputs->at(index));
  return nullptr;
}
size_t element_size(int32_t element) {
  switch (element) {
    case 1: case 6: case 12: return 4;
    case 7: case 11: case 13: return 8;
    case 4: case 5: case 10: case 16: return 2;
    default: return 1;
  }
}
ort::Status* output(ort::KernelContext* context, size_t index, const int64_t* dims, size_t rank, ort::Value** out) {
  Run& run = *as<Run>(context);
  if (static_cast<int>(index) == run.alias.second) {
    Array& shared = run.inputs->at(static_cast<size_t>(run.alias.first));
    if (shared.dims != std::vector<int64_t>(dims, dims + rank)) return failure("in place, but of another shape");
    *out = as<ort::Value>(&shared);
    return nullptr;
  }
  Array& made = run.outputs[index];
  made.element = run.types.at(index < run.types.size() ? index : run.types.size() - 1);  // the last may repeat
  made.dims.assign(dims, dims + rank);
  size_t count = 1;
  for (int64_t d : made.dims) count *= static_cast<size_t>(d);
  made.bytes = count * element_size(made.element);
  made.data = allocate(made.bytes);
  std::memset(made.data.get(), 0xff, made.bytes);  // NaN, should a kernel not write it
  *out = as<ort::Value>(&made);
  return nullptr;
}

ort::Status* infer_input(const ort::ShapeContext* context, size_t index, ort::TensorInfo** out) {
  *out = as<ort::TensorInfo>(&as<Shapes>(context)->inputs.at(index));
  return nullptr;
}
ort::Status* infer_output(const ort::ShapeContext* context, size_t index, const ort::TensorInfo* info) {
  as<Shapes>(context)->outputs[index] = *as<Info>(info);
  return nullptr;
}

ort::Status* infer_attribute(const ort::ShapeContext* context, const char* name, const ort::OpAttribute** out) {
  for (const Attribute& a : as<Shapes>(context)->is->attributes) {
    if (a.name != name) continue;
    *out = as<const ort::OpAttribute>(&a);
    return nullptr;
  }
  return failure("no such attribute");
}
ort::Status* read_attribute(const ort::OpAttribute* attribute, int32_t kind, void* to, size_t size, size_t* used) {
  const Attribute& a = *as<Attribute>(attribute);
  *used = sizeof(int64_t);
  if (kind != ort::kAttributeIsInt || a.kind != 'i' || size < *used) return failure("no integer is asked for");
  std::memcpy(to, &a.integers.at(0), *used);
  return nullptr;
}

// Threads take the next piece of work until there is none, as in the runtime's pool.
ort::Status* parallel_for(const ort::KernelContext* context, ort::Job job, size_t total, size_t, void* user) {
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next++; i < total; i = next++) job(user, i);
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < as<Run>(context)->threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& t : others) t.join();
  return nullptr;
}

template <size_t Index>
void* missing() {
  std::fprintf(stderr, "fake_ort.cc has no slot %zu of the API\n", Index);
  std::abort();
}

struct Table {
  void* slots[kSlots];

  template <size_t... Index>
  void fill(std::index_sequence<Index...>) {
    ((slots[Index] = reinterpret_cast<void*>(&missing<Index>)), ...);
  }
  template <class Function>
  void set(size_t index, Function* function) {
    slots[index] = reinterpret_cast<void*>(function);
  }
  Table() {
    fill(std::make_index_sequence<kSlots>{});
    set(0, create_status), set(1, error_code), set(2, error_message), set(93, release_status);
    set(26, create_domain), set(27, add_operator), set(28, add_domain);
    set(51, tensor_data), set(60, info_element), set(61, info_rank), set(62, info_dims);
    set(57, create_info), set(58, set_element), set(59, set_dims), set(63, info_symbols), set(271, set_symbols);
    set(65, tensor_info), set(99, release_info), set(414, tensor_shape);
    set(85, attribute_float), set(86, attribute_int), set(87, attribute_text);
    set(162, attribute_floats), set(163, attribute_ints);
    set(88, run_inputs), set(89, run_outputs), set(90, input), set(91, output), set(230, input_count), set(231, output_count);
    set(237, has_config), set(238, get_config), set(244, node_name), set(249, constant_input);
    set(268, infer_input), set(269, infer_attribute), set(270, infer_output), set(272, read_attribute);
    set(274, parallel_for);
  }
};

const ort::Api* table(uint32_t) {
  static const Table made;
  return made.slots;
}

const char* g_version = "";
const char* version_string() { return g_version; }

}  // namespace

const ort::ApiBase* fake_ort(const char* version) {
  static const ort::ApiBase base = {table, version_string};
  g_version = version;
  return &base;
}

std::string error_of(ort::Status* status) {
  if (status == nullptr) return "";
  const std::string text = error_message(status);
  release_status(status);
  return text;
}

}  // namespace harness
