// The part of ONNX Runtime's C API that stream.cc calls, declared here because the Python wheel ships the
// library without its headers. The API is an append-only table of functions, so a function's place in it
// holds for every later version; the places that stream.cc doesn't use have no name. With the headers of an
// ONNX Runtime release at hand, name their folder (-DONNXRUNTIME_INCLUDE=...): stream.cc compiles with both.
#pragma once

#include <stddef.h>
#include <stdint.h>

extern "C" {

struct OrtAllocator;
struct OrtEnv;
struct OrtIoBinding;
struct OrtMemoryInfo;
struct OrtRunOptions;
struct OrtSession;
struct OrtSessionOptions;
struct OrtStatus;
struct OrtValue;

typedef enum OrtLoggingLevel { ORT_LOGGING_LEVEL_ERROR = 3 } OrtLoggingLevel;
typedef enum OrtAllocatorType { OrtDeviceAllocator = 0 } OrtAllocatorType;
typedef enum OrtMemType { OrtMemTypeDefault = 0 } OrtMemType;
typedef enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
} ONNXTensorElementDataType;

typedef void* OrtUnnamed;  // a function that stream.cc doesn't call

// The comments give the place of the member that follows.
struct OrtApi {
  OrtUnnamed unnamed_0[2];
  const char* (*GetErrorMessage)(const OrtStatus*);  // 2
  OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char* name, OrtEnv** out);
  OrtUnnamed unnamed_4[3];
  OrtStatus* (*CreateSession)(const OrtEnv*, const char* path, const OrtSessionOptions*,
                              OrtSession** out);  // 7
  OrtUnnamed unnamed_8[2];
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions** out);  // 10
  OrtUnnamed unnamed_11[13];
  OrtStatus* (*SetIntraOpNumThreads)(OrtSessionOptions*, int threads);  // 24
  OrtUnnamed unnamed_25[4];
  OrtStatus* (*RegisterCustomOpsLibrary)(OrtSessionOptions*, const char* path, void** handle);  // 29
  OrtUnnamed unnamed_30[19];
  OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void* data, size_t bytes,
                                               const int64_t* shape, size_t rank, ONNXTensorElementDataType,
                                               OrtValue** out);  // 49
  OrtUnnamed unnamed_50[19];
  OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo** out);  // 69
  OrtUnnamed unnamed_70[22];
  void (*ReleaseEnv)(OrtEnv*);  // 92
  void (*ReleaseStatus)(OrtStatus*);
  void (*ReleaseMemoryInfo)(OrtMemoryInfo*);
  void (*ReleaseSession)(OrtSession*);
  void (*ReleaseValue)(OrtValue*);
  OrtUnnamed unnamed_97[3];
  void (*ReleaseSessionOptions)(OrtSessionOptions*);  // 100
  OrtUnnamed unnamed_101[29];
  OrtStatus* (*AddSessionConfigEntry)(OrtSessionOptions*, const char* key, const char* value);  // 130
  OrtUnnamed unnamed_131[2];
  OrtStatus* (*RunWithBinding)(OrtSession*, const OrtRunOptions*, const OrtIoBinding*);  // 133
  OrtStatus* (*CreateIoBinding)(OrtSession*, OrtIoBinding** out);
  void (*ReleaseIoBinding)(OrtIoBinding*);
  OrtStatus* (*BindInput)(OrtIoBinding*, const char* name, const OrtValue*);
  OrtStatus* (*BindOutput)(OrtIoBinding*, const char* name, const OrtValue*);  // 137
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // null: this library is older
  const char* (*GetVersionString)(void);
};

const OrtApiBase* OrtGetApiBase(void);

}  // extern "C"

static_assert(offsetof(OrtApi, CreateSession) == 7 * sizeof(void*), "the table of OrtApi");
static_assert(offsetof(OrtApi, RegisterCustomOpsLibrary) == 29 * sizeof(void*), "the table of OrtApi");
static_assert(offsetof(OrtApi, CreateCpuMemoryInfo) == 69 * sizeof(void*), "the table of OrtApi");
static_assert(offsetof(OrtApi, ReleaseSessionOptions) == 100 * sizeof(void*), "the table of OrtApi");
static_assert(offsetof(OrtApi, BindOutput) == 137 * sizeof(void*), "the table of OrtApi");
