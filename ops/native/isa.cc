#include "isa.h"

#include <stdexcept>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace xexport {
namespace {

constexpr Isa kAll[] = {Isa::baseline, Isa::avx2, Isa::avx512};

// What the portable baseline is called here: everything that runs this architecture has it.
#if defined(__x86_64__)
constexpr const char* kBaseline = "sse2";
#elif defined(__aarch64__)
constexpr const char* kBaseline = "neon";
#else
constexpr const char* kBaseline = "baseline";
#endif

#if defined(__x86_64__)
// Conversions between 16- and 32-bit floats; the compiler's own test doesn't know this name everywhere.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

bool available(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  }
  if (isa == Isa::avx512) {
    return available(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::baseline;
}

}  // namespace

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : kBaseline;
}

Isa best_isa() {
  Isa best = Isa::baseline;
  for (Isa isa : kAll) {
    if (available(isa)) best = isa;
  }
  return best;
}

Isa parse_isa(const std::string& name) {
  std::string known;
  for (Isa isa : kAll) {
    if (!available(isa)) continue;
    if (name == isa_name(isa) || (isa == Isa::baseline && name == "baseline")) return isa;
    known += std::string(known.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::invalid_argument("no instruction set '" + name + "' on this machine; it has " + known);
}

}  // namespace xexport
