// 16-bit floats, read as 32-bit ones.
#pragma once

#include "dot.h"

namespace xexport::XEXPORT_ISA {

// By whole-number arithmetic: the exponent is moved to its place and rebased by a product that is exact.
XEXPORT_INLINE float half_to_float(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13, sign = static_cast<uint32_t>(h & 0x8000) << 16;
  float value;
  std::memcpy(&value, &magnitude, sizeof(value));
  value *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((h & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000;  // infinity and NaN
  bits |= sign;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// kGroup of them.
XEXPORT_INLINE Floats read_halves(const uint16_t* p) {
#if defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps(read<__m128i>(p));
#elif defined(__aarch64__)
  return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  const Ints h = {p[0], p[1], p[2], p[3]};
  const Ints magnitude = (h & 0x7fff) << 13;
  Ints bits = (Ints)((Floats)magnitude * all_floats(0x1p112f));
  bits = (h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : bits;
  return (Floats)(bits | (h & 0x8000) << 16);
#endif
}

}  // namespace xexport::XEXPORT_ISA
