// Which instruction set the loops run on.
//
// Every loops.cc is compiled once per instruction set, each time inside a namespace of that name, and a
// kernel takes the table of loops of the set its session uses. Nothing else is compiled with more than the
// portable baseline, so the library loads on every machine of its architecture.
#pragma once

#include <string>

namespace xexport {

enum class Isa { baseline, avx2, avx512 };

// "avx2", "avx512", or for the baseline "sse2" on x86-64 and "neon" on ARM64.
const char* isa_name(Isa isa);

// The best one of this machine.
Isa best_isa();

// The one asked for by name, "baseline" being one on every machine. Throws std::invalid_argument, with those that this machine has, if it is
// unknown or the machine lacks it.
Isa parse_isa(const std::string& name);

}  // namespace xexport

// Declares `const Type& name(Isa)`, which picks among `XEXPORT_ISA::name` of every instruction set.
#if defined(__x86_64__)
#define XEXPORT_DECLARE_LOOPS(Type, name)                                              \
  namespace baseline { extern const Type name; }                                       \
  namespace avx2 { extern const Type name; }                                           \
  namespace avx512 { extern const Type name; }                                         \
  inline const Type& name(Isa isa) {                                                   \
    return isa == Isa::avx512 ? avx512::name : isa == Isa::avx2 ? avx2::name : baseline::name; \
  }
#else
#define XEXPORT_DECLARE_LOOPS(Type, name)        \
  namespace baseline { extern const Type name; } \
  inline const Type& name(Isa) { return baseline::name; }
#endif
