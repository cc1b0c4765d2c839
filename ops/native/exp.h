// Powers of two of products of vectors, for decays exp(x y) = 2^((x log2 e) y).
//
// 2^z = 2^n 2^f with n the integer nearest to z. 2^f on [-1/2, 1/2] is a polynomial of degree 5 with constant
// term 1 whose largest relative error is least (fitted by iterated reweighting): 9.2e-8. With its roundings
// 1.7e-7; a rounding of z adds 4.2e-8 |z|, as it does to the exp of any rounded product.
#pragma once

#include "simd.h"

namespace xexport::XEXPORT_ISA {

constexpr float kLog2E = 1.44269504088896341f;
// Adding 1.5 * 2^23 rounds to the nearest integer, which then is in the low 22 bits of the sum.
constexpr float kRounder = 12582912.0f;

// z, of which the compiler doesn't know that it is a product. It would make multiply-adds of what is to be an
// addition; those compete with the polynomial for the multipliers, while processors have adders idle.
XEXPORT_INLINE Vec no_product(Vec z) {
#if defined(__aarch64__)
  __asm__("" : "+w"(z));
#elif defined(__x86_64__)
  __asm__("" : "+x"(z));
#endif
  return z;
}

// z[i] = 2^(z[i]) for Count z in [-1/2, 1/2], the polynomial alone. They go side by side: a chain of dependent
// operations fills a processor's window before its end is done.
template <int Count>
XEXPORT_INLINE void exp2_short(Vec* z) {
  Vec p[Count];
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) p[i] = all(1.326472731e-3f) * z[i] + all(9.671512991e-3f);
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) p[i] = p[i] * z[i] + all(5.550733581e-2f);
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) p[i] = p[i] * z[i] + all(2.402224243e-1f);
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) p[i] = p[i] * z[i] + all(6.931470037e-1f);
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) z[i] = p[i] * z[i] + all(1.0f);
}
XEXPORT_INLINE Vec exp2_short(Vec z) {
  exp2_short<1>(&z);
  return z;
}

// Count powers 2^z[i] as fractions 2^f in [0.7, 1.42], left in z, and exponents n in the low 22 bits.
template <int Count>
XEXPORT_INLINE void powers(Vec* z, IntVec* exponents) {
  Vec p[Count];
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) p[i] = z[i] + all(kRounder);
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) std::memcpy(&exponents[i], &p[i], sizeof(Vec));
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) z[i] -= p[i] - all(kRounder);
  exp2_short<Count>(z);
}

// Where 2^z is neither zero, denormal, infinite nor NaN: -1, else 0.
XEXPORT_INLINE IntVec is_normal_power(Vec z) { return magnitude(z) < all(125.5f); }

// z[i] = 2^(z[i]) where is_normal_power(z[i]): the exponent can simply be added to the bits of the fraction.
template <int Count>
XEXPORT_INLINE void exp2_normal(Vec* z) {
  IntVec exponents[Count], bits;
  powers<Count>(z, exponents);
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i) {
    std::memcpy(&bits, &z[i], sizeof(bits));
    bits += exponents[i] << 23;  // shifts out the bits of kRounder
    std::memcpy(&z[i], &bits, sizeof(bits));
  }
}

XEXPORT_INLINE Vec power_of_integer(IntVec n) {
  const IntVec bits = (n + 127) << 23;
  Vec result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// 2^z for any z: 0 and denormals below, infinity above, NaN of NaN.
XEXPORT_INLINE Vec exp2_any(Vec z) {
  z = z < all(-151.0f) ? all(-151.0f) : z;  // rounds to 0; a comparison with NaN is false
  z = z > all(129.0f) ? all(129.0f) : z;
  IntVec n;
  powers<1>(&z, &n);
  n = (n << 10) >> 10;  // with its sign
  const IntVec half = n >> 1;
  return z * power_of_integer(half) * power_of_integer(n - half);
}
XEXPORT_INLINE Vec exp2_any(Vec x, Vec y) { return exp2_any(no_product(x * y)); }

}  // namespace xexport::XEXPORT_ISA
