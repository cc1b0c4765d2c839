// The part of ONNX Runtime's C ABI that a CPU operator library needs.
//
// The onnxruntime wheel ships no headers, and the ABI is an append-only table of function pointers, so the
// few slots in use are declared here: index and signature. They hold for API version 18 (onnxruntime 1.18)
// and every later one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace xexport::ort {

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TensorInfo;
struct ShapeContext;
struct OpAttribute;

// The lowest version with everything below, in-place outputs included. Stamping a newer one gains nothing
// and older runtimes would refuse it.
inline constexpr uint32_t kApiVersion = 18;
// From here on kTensorShape (below) exists, which reads a shape without an allocation.
inline constexpr uint32_t kShapeApiVersion = 24;

using Api = void* const;  // `const Api*` is the table

struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

enum class Element : int32_t { undefined = 0, f32 = 1, u8 = 2, i64 = 7, f16 = 10 };
enum class Arity : int32_t { required = 0, variadic = 2 };
enum class Memory : int32_t { standard = 0 };
enum Code : int32_t { kFail = 1, kInvalidArgument = 2, kRuntimeException = 6, kNotImplemented = 9 };

template <size_t Index, class Signature>
struct Slot;

template <size_t Index, class Result, class... Arguments>
struct Slot<Index, Result(Arguments...)> {
  Result operator()(const Api* api, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(api[Index])(arguments...);
  }
};

using Job = void (*)(void*, size_t);

inline constexpr Slot<0, Status*(int32_t, const char*)> kCreateStatus{};
inline constexpr Slot<26, Status*(const char*, CustomOpDomain**)> kCreateCustomOpDomain{};
inline constexpr Slot<27, Status*(CustomOpDomain*, const struct CustomOp*)> kCustomOpDomainAdd{};
inline constexpr Slot<28, Status*(SessionOptions*, CustomOpDomain*)> kAddCustomOpDomain{};
inline constexpr Slot<51, Status*(Value*, void**)> kTensorData{};
inline constexpr Slot<57, Status*(TensorInfo**)> kCreateInfo{};  // to be released
inline constexpr Slot<58, Status*(TensorInfo*, Element)> kSetElement{};
inline constexpr Slot<59, Status*(TensorInfo*, const int64_t*, size_t)> kSetDimensions{};
inline constexpr Slot<60, Status*(const TensorInfo*, Element*)> kInfoElement{};
inline constexpr Slot<61, Status*(const TensorInfo*, size_t*)> kInfoRank{};
inline constexpr Slot<62, Status*(const TensorInfo*, int64_t*, size_t)> kInfoDimensions{};
inline constexpr Slot<63, Status*(const TensorInfo*, const char**, size_t)> kInfoSymbols{};
inline constexpr Slot<65, Status*(const Value*, TensorInfo**)> kTensorInfo{};  // to be released
inline constexpr Slot<85, Status*(const KernelInfo*, const char*, float*)> kAttributeFloat{};
inline constexpr Slot<86, Status*(const KernelInfo*, const char*, int64_t*)> kAttributeInt{};
inline constexpr Slot<88, Status*(const KernelContext*, size_t*)> kInputCount{};
inline constexpr Slot<90, Status*(const KernelContext*, size_t, const Value**)> kInput{};
inline constexpr Slot<91, Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)> kOutput{};
inline constexpr Slot<93, void(Status*)> kReleaseStatus{};
inline constexpr Slot<99, void(TensorInfo*)> kReleaseTensorInfo{};
inline constexpr Slot<162, Status*(const KernelInfo*, const char*, float*, size_t*)> kAttributeFloats{};
inline constexpr Slot<163, Status*(const KernelInfo*, const char*, int64_t*, size_t*)> kAttributeInts{};
inline constexpr Slot<237, Status*(const SessionOptions*, const char*, int*)> kHasConfig{};
inline constexpr Slot<238, Status*(const SessionOptions*, const char*, char*, size_t*)> kGetConfig{};
inline constexpr Slot<244, Status*(const KernelInfo*, char*, size_t*)> kNodeName{};
inline constexpr Slot<249, Status*(const KernelInfo*, size_t, int*, const Value**)> kConstantInput{};
inline constexpr Slot<268, Status*(const ShapeContext*, size_t, TensorInfo**)> kInferInput{};  // borrowed
inline constexpr Slot<269, Status*(const ShapeContext*, const char*, const OpAttribute**)> kInferAttribute{};
inline constexpr Slot<270, Status*(const ShapeContext*, size_t, const TensorInfo*)> kInferOutput{};
inline constexpr Slot<271, Status*(TensorInfo*, const char**, size_t)> kSetSymbols{};
inline constexpr Slot<272, Status*(const OpAttribute*, int32_t, void*, size_t, size_t*)> kReadAttribute{};
inline constexpr Slot<274, Status*(const KernelContext*, Job, size_t, size_t, void*)> kParallelFor{};
inline constexpr Slot<414, Status*(const Value*, Element*, const int64_t**, size_t*)> kTensorShape{};

// Kinds of attributes that kReadAttribute is asked for.
inline constexpr int32_t kAttributeIsInt = 1;

// One operator as ONNX Runtime sees it; the order of the fields is the ABI.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);  // null: CPU
  Element (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  Element (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void*, KernelContext*);
  void (*KernelDestroy)(void*);
  Arity (*GetInputCharacteristic)(const CustomOp*, size_t);
  Arity (*GetOutputCharacteristic)(const CustomOp*, size_t);
  Memory (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void**);
  Status* (*KernelComputeV2)(void*, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};
static_assert(sizeof(void*) == 8 && sizeof(CustomOp) == 208, "the layout of OrtCustomOp in API 18");
static_assert(offsetof(CustomOp, CreateKernelV2) == 136 && offsetof(CustomOp, GetMayInplace) == 176);

}  // namespace xexport::ort
