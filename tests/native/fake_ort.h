// The slots of ONNX Runtime's C API that the kernels use, without ONNX Runtime: so that a sanitizer sees all
// code there is, and an emulator needs nothing but the library.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../../ops/native/ort_abi.h"
#include "cases.h"

namespace harness {

struct Status {
  int32_t code;
  std::string text;
};

struct Info {
  int32_t element = 0;
  std::vector<int64_t> dims;
};

// The node that a kernel is made of.
struct Node {
  std::string name;
  const Case* is = nullptr;
};

struct Shapes {
  const Case* is = nullptr;
  std::vector<Info> inputs;
  std::map<size_t, Info> outputs;
};

// One run: the arrays that the kernel reads, and those it asks for. `alias`: the output that lies in the
// memory of an input, as {input, output}, or {-1, -1}.
struct Run {
  std::vector<Array>* inputs = nullptr;
  std::vector<int32_t> types;  // of the outputs
  std::map<size_t, Array> outputs;
  std::pair<int, int> alias{-1, -1};
  unsigned threads = 1;
  size_t output_count = 0;
};

struct Session {
  std::map<std::string, std::string> config;
  std::vector<const xexport::ort::CustomOp*> operators;
};

// The API as onnxruntime `version` ("1.18.0") gives it out.
const xexport::ort::ApiBase* fake_ort(const char* version);

// The error of a call, which it frees; empty if there is none.
std::string error_of(xexport::ort::Status* status);

}  // namespace harness
