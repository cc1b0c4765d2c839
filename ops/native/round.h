// Rounding a block of activations to whole numbers, symmetrically, with a scale of its own.
#pragma once

#include "dot.h"

namespace xexport::XEXPORT_ISA {

struct Rounding {
  float inverse;  // 0 where the block is not finite or as good as zero
  float scale;    // NaN where the block is not finite
};

XEXPORT_INLINE Floats read_floats(const float* x, int64_t k, int64_t count) {
  if (k + kGroup <= count) return read<Floats>(x + k);
  Floats v = {};
  for (int i = 0; i < kGroup && k + i < count; ++i) v[i] = x[k + i];
  return v;
}

// For the `count` numbers at x, the largest of which becomes `top`.
XEXPORT_INLINE Rounding rounding_of(const float* x, int64_t count, float top) {
  Ints largest = {};  // as bits, without signs: infinities and NaN are larger than every number
  for (int64_t k = 0; k < count; k += kGroup) {
    const Ints bits = (Ints)read_floats(x, k, count) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  int32_t most = 0;
  for (int i = 0; i < kGroup; ++i) most = largest[i] > most ? largest[i] : most;
  if (most >= 0x7f800000) return {0.0f, __builtin_nanf("")};
  float size;
  std::memcpy(&size, &most, sizeof(size));
  // the reciprocal of a smaller number can be infinite; its products are below every other rounding error
  if (size < 1e-30f) return {0.0f, 0.0f};
  return {top / size, size / top};
}

// Adding 1.5 * 2^23 rounds to the nearest whole number, which then is in the low bits of the sum.
XEXPORT_INLINE Ints rounded(const Rounding& rounding, const float* x, int64_t k, int64_t count) {
  if (rounding.inverse == 0.0f) return Ints{};  // NaN times zero would not be zero
  const Floats v = read_floats(x, k, count) * all_floats(rounding.inverse) + all_floats(12582912.0f);
  return (Ints)v - 0x4b400000;
}

// Even and odd elements of a and b, in order.
XEXPORT_INLINE void split(Ints a, Ints b, Ints& even, Ints& odd) {
#if defined(__AVX2__)
  even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  even = __builtin_shufflevector(a, b, 0, 2, 4, 6);
  odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// The low halfwords of a and b.
XEXPORT_INLINE Shorts low_halves(Ints a, Ints b) {
  const Shorts x = (Shorts)a, y = (Shorts)b;
#if defined(__AVX2__)
  return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#else
  return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14);
#endif
}

XEXPORT_INLINE int32_t sum_of(Ints v) {
  int32_t total = 0;
  for (int i = 0; i < kGroup; ++i) total += v[i];
  return total;
}

}  // namespace xexport::XEXPORT_ISA
