// An ONNX Runtime operator made of a kernel class, and its registration.
//
// A kernel class has
//   static constexpr const char* kName;                   the operator's name in the domain `xexport`
//   static constexpr ort::Element kInputs[], kOutputs[];  types, all inputs and outputs being required
//   static constexpr int kInPlace[2];                     {input, output} that may share memory, or {-1, -1}
//   static void infer(ort::ShapeContext*);                shapes of the outputs
//   Kernel(const Node&, Isa);                             reads attributes
//   void compute(const Call&) const;                      thread-safe
// and its file ends with `static const Registered<Kernel> registered;`, or, if a file's function bodies need the
// operator under several names, with `static const RegisteredNumbered<Kernel, HOW MANY> registered;`.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "isa.h"
#include "node.h"

namespace xexport {

struct MakeOperator {
  std::function<ort::CustomOp*(Isa)> make;
  bool runs_others;  // with its body in its place a profile shows those
};

// A kernel of any class.
struct AnyKernel {
  virtual ~AnyKernel() = default;
  virtual void compute(const Call& call) const = 0;
};
// A kernel class: its inputs' types (one for all, if it has any number of them), and how one is made.
struct KernelClass {
  const ort::Element* inputs;
  size_t input_count;
  bool numbered;
  std::unique_ptr<AnyKernel> (*make)(const Node&, Isa);
};

// Every operator of the library; filled while it is loaded.
std::vector<MakeOperator>& operators();
// Every kernel class by its operator's name, without a number: some have one for each type of weight. Filled while
// the library is loaded.
std::multimap<std::string, KernelClass>& kernels();
// Names of those with kInPlace, separated by commas; filled while it is loaded.
std::string& in_place_operators();

// Runs `body`, turning any exception into a status: none crosses the C boundary.
template <class Body>
ort::Status* guarded(Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const StatusError& error) {
    return error.status;
  } catch (const std::exception& error) {
    return ort::kCreateStatus(api(), ort::kRuntimeException, error.what());
  } catch (...) {
    return ort::kCreateStatus(api(), ort::kRuntimeException, "xexport kernel: unknown exception");
  }
}

template <class Kernel>
struct Operator : ort::CustomOp {
  Isa isa;

  explicit Operator(Isa which) : ort::CustomOp{}, isa(which) {
    using namespace ort;
    version = kApiVersion;
    GetName = [](const CustomOp*) { return Kernel::kName; };
    GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
    GetInputType = [](const CustomOp*, size_t i) { return Kernel::kInputs[i]; };
    GetInputTypeCount = [](const CustomOp*) { return std::size(Kernel::kInputs); };
    GetOutputType = [](const CustomOp*, size_t i) { return Kernel::kOutputs[i]; };
    GetOutputTypeCount = [](const CustomOp*) { return std::size(Kernel::kOutputs); };
    GetInputCharacteristic = [](const CustomOp*, size_t) { return Arity::required; };
    GetOutputCharacteristic = [](const CustomOp*, size_t) { return Arity::required; };
    GetInputMemoryType = [](const CustomOp*, size_t) { return Memory::standard; };
    GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const CustomOp*) { return 1; };
    GetVariadicOutputMinArity = [](const CustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const CustomOp*) { return 1; };
    CreateKernelV2 = [](const CustomOp* op, const Api*, const KernelInfo* info, void** out) {
      return guarded([&] { *out = new Kernel(Node(Kernel::kName, info), static_cast<const Operator*>(op)->isa); });
    };
    KernelComputeV2 = [](void* kernel, KernelContext* context) {
      return guarded([&] { static_cast<const Kernel*>(kernel)->compute(Call(context)); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    InferOutputShapeFn = [](const CustomOp*, ShapeContext* context) {
      return guarded([&] { Kernel::infer(context); });
    };
    GetStartVersion = [](const CustomOp*) { return 1; };
    GetEndVersion = [](const CustomOp*) { return INT32_MAX; };
    GetMayInplace = [](int** inputs, int** outputs) -> size_t {
      *inputs = *outputs = nullptr;
      if (Kernel::kInPlace[0] < 0) return 0;
      *inputs = new int[1]{Kernel::kInPlace[0]};
      *outputs = new int[1]{Kernel::kInPlace[1]};
      return 1;
    };
    ReleaseMayInplace = release;
    GetAliasMap = [](int** inputs, int** outputs) -> size_t {
      *inputs = *outputs = nullptr;
      return 0;
    };
    ReleaseAliasMap = release;
  }

 private:
  static void release(int* inputs, int* outputs) {
    delete[] inputs;
    delete[] outputs;
  }
};

template <class Kernel>
void add_kernel(bool numbered) {
  struct Wrapped : AnyKernel {
    Kernel kernel;
    Wrapped(const Node& node, Isa isa) : kernel(node, isa) {}
    void compute(const Call& call) const override { kernel.compute(call); }
  };
  const auto make = [](const Node& node, Isa isa) -> std::unique_ptr<AnyKernel> {
    return std::make_unique<Wrapped>(node, isa);
  };
  kernels().insert({Kernel::kName, {std::data(Kernel::kInputs), std::size(Kernel::kInputs), numbered, make}});
}

template <class Kernel>
struct Registered {
  Registered() {
    add_kernel<Kernel>(false);
    operators().push_back({[](Isa isa) -> ort::CustomOp* { return new Operator<Kernel>(isa); }, false});
    if (Kernel::kInPlace[0] < 0) return;
    std::string& names = in_place_operators();
    names += (names.empty() ? "" : ",") + std::string(Kernel::kName);
  }
};

// One kernel under the name <kName>_<number>, with any number of inputs and outputs: a function's name is all that
// ties a node to the body that a file carries for runtimes without this library. kInputs and kOutputs have one
// element, for all; Element::undefined: the inputs may differ.
template <class Kernel>
struct Numbered : Operator<Kernel> {
  std::string name;

  Numbered(Isa isa, int number) : Operator<Kernel>(isa), name(Kernel::kName + ("_" + std::to_string(number))) {
    using ort::CustomOp;
    this->GetName = [](const CustomOp* op) { return static_cast<const Numbered*>(op)->name.c_str(); };
    this->GetInputCharacteristic = [](const CustomOp*, size_t) { return ort::Arity::variadic; };
    this->GetOutputCharacteristic = [](const CustomOp*, size_t) { return ort::Arity::variadic; };
    this->GetVariadicInputHomogeneity = [](const CustomOp*) {
      return Kernel::kInputs[0] == ort::Element::undefined ? 0 : 1;
    };
    this->InferOutputShapeFn = nullptr;
  }
};

template <class Kernel, int kCount, bool kRunsOthers = false>
struct RegisteredNumbered {
  RegisteredNumbered() {
    add_kernel<Kernel>(true);
    for (int i = 0; i < kCount; ++i) {
      operators().push_back({[i](Isa isa) -> ort::CustomOp* { return new Numbered<Kernel>(isa, i); }, kRunsOthers});
    }
  }
};

}  // namespace xexport
