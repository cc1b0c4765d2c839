// The entry points of the library: registration with ONNX Runtime, and what `xexport doctor` asks.

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

#include "../fft_conv/convolution.h"
#include "large_pages.h"
#include "operator.h"

#define XEXPORT_PUBLIC extern "C" __attribute__((visibility("default")))

namespace xexport {
namespace {

const ort::Api* g_api = nullptr;
bool g_has_shape_slot = false;

// The minor version of onnxruntime 1.<minor>, or 0. It is asked before GetApi, which prints a line to
// stderr when the version is too new for it.
unsigned minor_version(const char* version) {
  unsigned major = 0, minor = 0;
  return std::sscanf(version, "%u.%u", &major, &minor) == 2 && major == 1 ? minor : 0;
}

// An entry of a session's options; "" if it has none.
std::string entry(const ort::SessionOptions* options, const char* key) {
  int present = 0;
  check(ort::kHasConfig(g_api, options, key, &present));
  if (present == 0) return "";
  size_t size = 0;
  check(ort::kGetConfig(g_api, options, key, nullptr, &size));
  std::string value(size, '\0');
  check(ort::kGetConfig(g_api, options, key, value.data(), &size));
  return value.c_str();  // up to the terminator
}

// The instruction set of a session: its entry `xexport.isa`, the variable XEXPORT_ISA, or the best.
Isa session_isa(const ort::SessionOptions* options) {
  const std::string name = entry(options, "xexport.isa");
  if (!name.empty()) return parse_isa(name.c_str());
  const char* wanted = std::getenv("XEXPORT_ISA");
  return wanted != nullptr && *wanted != '\0' ? parse_isa(wanted) : best_isa();
}

// The domain of one instruction set, without operators that run others if `apart`. It is made once and never freed:
// sessions keep pointers into it.
ort::CustomOpDomain* domain(Isa isa, bool apart) {
  static ort::CustomOpDomain* made[3][2] = {};
  ort::CustomOpDomain*& slot = made[static_cast<int>(isa)][apart ? 1 : 0];
  if (slot == nullptr) {
    ort::CustomOpDomain* fresh = nullptr;
    check(ort::kCreateCustomOpDomain(g_api, "xexport", &fresh));
    for (const MakeOperator& one : operators()) {
      if (!apart || !one.runs_others) check(ort::kCustomOpDomainAdd(g_api, fresh, one.make(isa)));
    }
    slot = fresh;
  }
  return slot;
}

}  // namespace

const ort::Api* api() { return g_api; }
bool has_shape_slot() { return g_has_shape_slot; }

std::vector<MakeOperator>& operators() {
  static std::vector<MakeOperator> all;
  return all;
}

std::multimap<std::string, KernelClass>& kernels() {
  static std::multimap<std::string, KernelClass> all;
  return all;
}

std::string& in_place_operators() {
  static std::string names;
  return names;
}

}  // namespace xexport

XEXPORT_PUBLIC xexport::ort::Status* RegisterCustomOps(xexport::ort::SessionOptions* options,
                                                       const xexport::ort::ApiBase* base) {
  using namespace xexport;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const unsigned minor = minor_version(base->GetVersionString());
  if (minor < ort::kApiVersion) {
    char text[128];
    std::snprintf(text, sizeof(text), "the xexport kernels need onnxruntime 1.%u or newer, this is %s",
                  ort::kApiVersion, base->GetVersionString());
    return ort::kCreateStatus(base->GetApi(1), ort::kNotImplemented, text);  // slot 0 since version 1
  }
  g_has_shape_slot = minor >= ort::kShapeApiVersion;
  g_api = base->GetApi(g_has_shape_slot ? ort::kShapeApiVersion : ort::kApiVersion);
  return guarded([&] {
    const bool apart = entry(options, "xexport.sequences") == "0";
    check(ort::kAddCustomOpDomain(g_api, options, domain(session_isa(options), apart)));
  });
}

// The instruction set that sessions of this process get unless they ask for another; "" if XEXPORT_ISA
// names one that this machine lacks.
XEXPORT_PUBLIC const char* xexport_native_isa() {
  try {
    const char* wanted = std::getenv("XEXPORT_ISA");
    return xexport::isa_name(wanted != nullptr && *wanted != '\0' ? xexport::parse_isa(wanted)
                                                                  : xexport::best_isa());
  } catch (...) {
    return "";
  }
}

// Bytes of filters' spectra that are kept; ops/fft_conv/convolution.cc bounds them.
XEXPORT_PUBLIC int64_t xexport_native_spectrum_bytes() { return xexport::spectrum_bytes(); }

// The operators that may write an output over an input, separated by commas.
XEXPORT_PUBLIC const char* xexport_native_in_place() { return xexport::in_place_operators().c_str(); }

// The oldest onnxruntime 1.<minor> that the library works with.
XEXPORT_PUBLIC unsigned xexport_native_oldest_minor() { return xexport::ort::kApiVersion; }

// 1 if constant weights are copied into large pages where memory allows.
XEXPORT_PUBLIC int xexport_native_large_pages() { return xexport::large_pages_wanted() ? 1 : 0; }
