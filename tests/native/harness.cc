// Runs the kernels of a library without ONNX Runtime, over the cases of cases.py:
//
//   harness LIBRARY CASES [onnxruntime's version]
//
// on every instruction set of this machine, from one thread and from several at once, with the state apart
// and in place, and with a wrong rank, which has to be refused. Built with a sanitizer or for another
// architecture it needs nothing else; tests/native/check.sh does both.
#include <dlfcn.h>

#include <cmath>
#include <thread>

#include "fake_ort.h"

namespace harness {
namespace {

namespace ort = xexport::ort;
using Register = ort::Status* (*)(ort::SessionOptions*, const ort::ApiBase*);

constexpr unsigned kThreads = 3;  // that call a kernel at once, each with as many in its pool
const char* const kIsas[] = {"baseline", "avx2", "avx512"};

int g_failures = 0, g_checks = 0;

void expect(bool good, const Case& c, const std::string& isa, const std::string& what) {
  ++g_checks;
  if (good) return;
  ++g_failures;
  std::printf("FAILED %s %s on %s: %s\n", c.op.c_str(), c.label.c_str(), isa.c_str(), what.c_str());
}

// A kernel, made and destroyed as a session does it.
class Kernel {
 public:
  Kernel(const ort::CustomOp* op, const Case& c) : op_(op) {
    node_ = {"case0", &c};
    const auto* info = reinterpret_cast<const ort::KernelInfo*>(&node_);
    error = error_of(op->CreateKernelV2(op, nullptr, info, &kernel_));
  }
  ~Kernel() {
    if (kernel_ != nullptr) op_->KernelDestroy(kernel_);
  }
  Kernel(const Kernel&) = delete;

  std::string run(Run& run) const {
    return error_of(op_->KernelComputeV2(kernel_, reinterpret_cast<ort::KernelContext*>(&run)));
  }

  std::string error;

 private:
  const ort::CustomOp* op_;
  Node node_;
  void* kernel_ = nullptr;
};

std::vector<int32_t> output_types(const ort::CustomOp* op) {
  std::vector<int32_t> types;
  for (size_t i = 0; i < op->GetOutputTypeCount(op); ++i) {
    types.push_back(static_cast<int32_t>(op->GetOutputType(op, i)));
  }
  return types;
}

std::pair<int, int> alias_of(const ort::CustomOp* op) {
  int *inputs = nullptr, *outputs = nullptr;
  if (op->GetMayInplace == nullptr) return {-1, -1};
  const size_t count = op->GetMayInplace(&inputs, &outputs);
  const std::pair<int, int> pair = count > 0 ? std::make_pair(inputs[0], outputs[0]) : std::make_pair(-1, -1);
  op->ReleaseMayInplace(inputs, outputs);
  return pair;
}

// The largest difference over the largest expected value or 1; infinite where one of two is NaN, or a type or
// shape differs. Whatever isn't float32 has to be equal.
double difference(const Array& got, const Array& want) {
  if (got.element != want.element || got.dims != want.dims) return HUGE_VAL;
  if (got.element != 1) return std::memcmp(got.data.get(), want.data.get(), want.bytes) == 0 ? 0 : HUGE_VAL;
  const auto *a = reinterpret_cast<const float*>(got.data.get()), *b = reinterpret_cast<const float*>(want.data.get());
  double worst = 0, scale = 1;
  for (size_t i = 0; i < want.bytes / sizeof(float); ++i) {
    if (std::isnan(a[i]) != std::isnan(b[i])) return HUGE_VAL;
    if (std::isnan(b[i]) || a[i] == b[i]) continue;
    worst = std::fmax(worst, std::fabs(static_cast<double>(a[i]) - b[i]));
    scale = std::fmax(scale, std::fabs(static_cast<double>(b[i])));
  }
  return worst / scale;
}

std::string compared(const Case& c, const Run& run) {
  for (size_t i = 0; i < c.outputs.size(); ++i) {
    const bool shared = static_cast<int>(i) == run.alias.second;
    if (!shared && run.outputs.count(i) == 0) return "output " + std::to_string(i) + " was not made";
    const Array& got = shared ? run.inputs->at(static_cast<size_t>(run.alias.first)) : run.outputs.at(i);
    const double off = difference(got, c.outputs[i]);
    if (!(off <= c.tolerance)) return "output " + std::to_string(i) + " is off by " + std::to_string(off);
  }
  for (size_t i = 0; i < c.inputs.size(); ++i) {
    const bool written = static_cast<int>(i) == run.alias.first;
    if (!written && std::memcmp(run.inputs->at(i).data.get(), c.inputs[i].data.get(), c.inputs[i].bytes) != 0) {
      return "input " + std::to_string(i) + " was changed";
    }
  }
  return "";
}

// Runs the case once, with arrays of its own; empty if all is as expected.
std::string run_once(const Kernel& kernel, const Case& c, const ort::CustomOp* op, std::pair<int, int> alias,
                     unsigned threads) {
  std::vector<Array> inputs = c.inputs;
  Run run;
  run.inputs = &inputs;
  run.types = output_types(op);
  run.alias = alias;
  run.threads = threads;
  run.output_count = c.outputs.size();
  const std::string error = kernel.run(run);
  return error.empty() ? compared(c, run) : error;
}

// Whatever shapes the operator infers have to be those that come out.
std::string inferred(const Case& c, const ort::CustomOp* op) {
  if (op->InferOutputShapeFn == nullptr) return "";
  Shapes shapes;
  shapes.is = &c;
  for (const Array& a : c.inputs) shapes.inputs.push_back({a.element, a.dims});
  const std::string error = error_of(op->InferOutputShapeFn(op, reinterpret_cast<ort::ShapeContext*>(&shapes)));
  for (const auto& [index, info] : shapes.outputs) {
    if (info.dims != c.outputs.at(index).dims) return "the inferred shape of an output is wrong";
  }
  return error;
}

std::string refuses_a_wrong_rank(const Kernel& kernel, const Case& c, const ort::CustomOp* op) {
  std::string error;
  for (size_t i = 0; i < 2 && i < c.inputs.size(); ++i) {  // a product takes any rank of its first input
    Case wrong = c;
    wrong.inputs[i].dims.insert(wrong.inputs[i].dims.begin(), 1);
    error = run_once(kernel, wrong, op, {-1, -1}, 1);
    if (error.find("'case0'") != std::string::npos) return "";
  }
  return "a wrong rank was not refused by name: " + error;
}

void check(const Case& c, const ort::CustomOp* op, const std::string& isa) {
  const Kernel kernel(op, c);
  expect(kernel.error.empty(), c, isa, kernel.error);
  if (!kernel.error.empty()) return;
  const auto say = [&](const std::string& how, const std::string& error) {
    expect(error.empty(), c, isa, how + ": " + error);
  };
  say("shapes", inferred(c, op));
  say("alone", run_once(kernel, c, op, {-1, -1}, 1));
  if (const auto alias = alias_of(op); alias.first >= 0) say("in place", run_once(kernel, c, op, alias, kThreads));
  say("refusal", refuses_a_wrong_rank(kernel, c, op));
  // a fresh kernel, so that whatever it keeps is made by several threads at once
  const Kernel fresh(op, c);
  std::vector<std::string> errors(kThreads);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] { errors[i] = run_once(fresh, c, op, {-1, -1}, kThreads); });
  }
  for (std::thread& t : threads) t.join();
  for (const std::string& error : errors) say("together", error);
}

// What tells operators of one name apart: the types of their inputs.
std::string types_of(const ort::CustomOp* op) {
  std::string types;
  for (size_t i = 0; i < op->GetInputTypeCount(op); ++i) {
    types += " " + std::to_string(static_cast<int32_t>(op->GetInputType(op, i)));
  }
  return types;
}

bool takes(const ort::CustomOp* op, const Case& c) {
  if (c.op != op->GetName(op)) return false;
  for (size_t i = 0; i < op->GetInputTypeCount(op) && i < c.inputs.size(); ++i) {
    const auto type = static_cast<int32_t>(op->GetInputType(op, i));
    if (type != 0 && type != c.inputs[i].element) return false;  // 0: any
  }
  return true;
}

int run(const char* library, const char* file, const char* version) {
  void* handle = dlopen(library, RTLD_NOW);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  const auto registration = reinterpret_cast<Register>(dlsym(handle, "RegisterCustomOps"));
  const auto best = reinterpret_cast<const char* (*)()>(dlsym(handle, "xexport_native_isa"));
  if (registration == nullptr || best == nullptr) throw std::runtime_error("the library lacks its entry points");
  const std::vector<Case> cases = Reader(file).all();
  std::string ran;
  for (const std::string isa : kIsas) {
    Session session;
    session.config["xexport.isa"] = isa;
    const std::string error =
        error_of(registration(reinterpret_cast<ort::SessionOptions*>(&session), fake_ort(version)));
    if (error.find("no instruction set") != std::string::npos) continue;
    if (!error.empty()) throw std::runtime_error(error);
    ran += " " + isa;
    std::map<std::string, bool> seen;
    // name_3 is the kernel of name_0
    const auto kind = [](const std::string& name) {
      const size_t end = name.find_last_not_of("0123456789");
      return name[end] == '_' ? name.substr(0, end) : name;
    };
    for (const ort::CustomOp* op : session.operators) {
      for (const Case& c : cases) {
        if (!takes(op, c)) continue;
        seen[kind(c.op) + types_of(op)] = true;
        check(c, op, isa);
      }
    }
    for (const ort::CustomOp* op : session.operators) {
      if (seen[kind(op->GetName(op)) + types_of(op)]) continue;
      ++g_failures;
      std::printf("FAILED %s(%s ): cases.py has no case of it\n", op->GetName(op), types_of(op).c_str());
    }
  }
  std::printf("%s (best: %s), as onnxruntime %s: %zu cases on%s, %d checks, %d failures\n", library, best(), version,
              cases.size(), ran.c_str(), g_checks, g_failures);
  return g_failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace harness

int main(int count, char** arguments) {
  if (count < 3) {
    std::fprintf(stderr, "harness LIBRARY CASES [onnxruntime's version]\n");
    return 2;
  }
  try {
    return harness::run(arguments[1], arguments[2], count > 3 ? arguments[3] : "1.31.0");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
