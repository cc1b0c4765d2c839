// Cases written by cases.py: an operator's attributes, inputs and what its reference makes of them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace harness {

// Memory of exactly this size, at a cache line as a runtime's is: a sanitizer sees any byte beyond.
struct Free {
  void operator()(char* p) const { std::free(p); }
};
using Memory = std::unique_ptr<char, Free>;
inline Memory allocate(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, bytes > 0 ? bytes : 1) != 0) throw std::bad_alloc();
  return Memory(static_cast<char*>(p));
}

struct Array {
  int32_t element = 0;  // ONNX's numbers: 1 float32, 2 uint8, 3 int8, 7 int64 ...
  bool constant = false;
  std::vector<int64_t> dims;
  Memory data;
  size_t bytes = 0;

  Array() = default;
  Array(Array&&) = default;
  Array& operator=(Array&&) = default;
  Array(const Array& other) : element(other.element), constant(other.constant), dims(other.dims), bytes(other.bytes) {
    data = allocate(bytes);
    std::memcpy(data.get(), other.data.get(), bytes);
  }
};

struct Attribute {
  std::string name;
  char kind = 'i';  // i: integers, f: floats, s: string
  std::vector<int64_t> integers;
  std::vector<double> reals;
  std::string text;
};

struct Case {
  std::string op, label;
  double tolerance = 0;
  std::vector<Attribute> attributes;
  std::vector<Array> inputs, outputs;
};

// Little-endian integers of 8 bytes, doubles, strings and arrays after their lengths.
class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (file_ == nullptr) throw std::runtime_error(std::string("can't open ") + path);
  }
  ~Reader() { std::fclose(file_); }

  std::vector<Case> all() {
    if (text() != "xexport cases 1") throw std::runtime_error("not a file of cases");
    std::vector<Case> cases(static_cast<size_t>(integer()));
    for (Case& c : cases) {
      c.op = text();
      c.label = text();
      c.tolerance = number<double>();
      c.attributes.resize(static_cast<size_t>(integer()));
      for (Attribute& a : c.attributes) {
        a.name = text();
        a.kind = text().at(0);
        a.integers.resize(static_cast<size_t>(integer()));
        for (int64_t& n : a.integers) n = integer();
        a.reals.resize(static_cast<size_t>(integer()));
        for (double& n : a.reals) n = number<double>();
        a.text = text();
      }
      for (std::vector<Array>* list : {&c.inputs, &c.outputs}) {
        list->resize(static_cast<size_t>(integer()));
        for (Array& a : *list) a = array();
      }
    }
    return cases;
  }

 private:
  std::FILE* file_;

  void bytes(void* to, size_t count) {
    if (count > 0 && std::fread(to, 1, count, file_) != count) throw std::runtime_error("the file of cases is short");
  }
  template <class T>
  T number() {
    T value;
    bytes(&value, sizeof(value));
    return value;
  }
  int64_t integer() { return number<int64_t>(); }
  std::string text() {
    std::string s(static_cast<size_t>(integer()), '\0');
    bytes(s.data(), s.size());
    return s;
  }
  Array array() {
    Array a;
    a.element = static_cast<int32_t>(integer());
    a.constant = integer() != 0;
    a.dims.resize(static_cast<size_t>(integer()));
    for (int64_t& d : a.dims) d = integer();
    a.bytes = static_cast<size_t>(integer());
    a.data = allocate(a.bytes);
    bytes(a.data.get(), a.bytes);
    return a;
  }
};

}  // namespace harness
