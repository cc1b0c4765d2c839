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

struct Power {
  Vec fraction;     // 2^f, in [0.7, 1.42]
  IntVec exponent;  // n in the low 22 bits
};

XEXPORT_INLINE Power power_of_product(Vec x, Vec y) {
  const Vec rounded = x * y + all(kRounder);
  const Vec n = rounded - all(kRounder);
  const Vec f = x * y - n;  // with a fused multiply-add the product is never rounded
  const Vec f2 = f * f;
  Vec p = all(1.326472731e-3f) * f + all(9.671512991e-3f);
  p = p * f2 + (all(5.550733581e-2f) * f + all(2.402224243e-1f));
  p = p * f2 + (all(6.931470037e-1f) * f + all(1.0f));
  IntVec bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  return {p, bits};
}

// Where 2^z is neither zero, denormal, infinite nor NaN: -1, else 0.
XEXPORT_INLINE IntVec is_normal_power(Vec z) {
  IntVec bits;
  std::memcpy(&bits, &z, sizeof(bits));
  bits &= 0x7fffffff;
  Vec size;
  std::memcpy(&size, &bits, sizeof(size));
  return size < all(125.5f);
}

// 2^(x y) where is_normal_power(x y): the exponent can simply be added to the bits of the fraction.
XEXPORT_INLINE Vec exp2_normal(Vec x, Vec y) {
  const Power power = power_of_product(x, y);
  IntVec bits;
  std::memcpy(&bits, &power.fraction, sizeof(bits));
  bits += power.exponent << 23;  // shifts out the bits of kRounder
  Vec result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

XEXPORT_INLINE Vec power_of_integer(IntVec n) {
  const IntVec bits = (n + 127) << 23;
  Vec result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// 2^(x y) for any x and y: 0 and denormals below, infinity above, NaN of NaN.
XEXPORT_INLINE Vec exp2_any(Vec x, Vec y) {
  Vec z = x * y;
  z = z < all(-151.0f) ? all(-151.0f) : z;  // rounds to 0; a comparison with NaN is false
  z = z > all(129.0f) ? all(129.0f) : z;
  const Power power = power_of_product(z, all(1.0f));
  const IntVec n = (power.exponent << 10) >> 10;  // with its sign
  const IntVec half = n >> 1;
  return power.fraction * power_of_integer(half) * power_of_integer(n - half);
}

}  // namespace xexport::XEXPORT_ISA
