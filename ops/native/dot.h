// Whole-number products of bytes and halfwords, and sums across lanes, for the loops of matrix products.
//
// `Narrow` vectors (32 bytes with AVX2 and beyond, else 16) run along a row of a matrix; `Vec`s of simd.h have
// one column of the result in each lane. All sums of a block are exact, so which of the two computed a result
// can't be seen in it.
#pragma once

#include "simd.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace xexport::XEXPORT_ISA {

#if defined(__AVX2__)
constexpr int kNarrow = 32;
#else
constexpr int kNarrow = 16;
#endif
// Rows of the matrix that are read together: as many as a Narrow vector has 32-bit lanes.
constexpr int kGroup = kNarrow / 4;

template <int Bytes>
struct Of {
  typedef uint8_t U8 __attribute__((vector_size(Bytes)));
  typedef int8_t S8 __attribute__((vector_size(Bytes)));
  typedef uint16_t U16 __attribute__((vector_size(Bytes)));
  typedef int16_t S16 __attribute__((vector_size(Bytes)));
  typedef int32_t S32 __attribute__((vector_size(Bytes)));
  typedef float F32 __attribute__((vector_size(Bytes)));
};
typedef Of<kNarrow>::U8 Bytes;
typedef Of<kNarrow>::U16 Words;
typedef Of<kNarrow>::S16 Shorts;
typedef Of<kNarrow>::S32 Ints;
typedef Of<kNarrow>::F32 Floats;

template <class V>
XEXPORT_INLINE V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
XEXPORT_INLINE void write(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

XEXPORT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// Sums of neighbouring products: lane i is a[2i] b[2i] + a[2i+1] b[2i+1].
template <int N>
XEXPORT_INLINE typename Of<N>::S32 madd(typename Of<N>::S16 a, typename Of<N>::S16 b) {
#if defined(__AVX512BW__)
  if constexpr (N == 64) return (typename Of<N>::S32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
#if defined(__AVX2__)
  if constexpr (N == 32) return (typename Of<N>::S32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
#if defined(__SSE2__)
  if constexpr (N == 16) return (typename Of<N>::S32)_mm_madd_epi16((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  const int16x8_t x = (int16x8_t)a, y = (int16x8_t)b;
  return (typename Of<N>::S32)vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y));
#else
  typename Of<N>::S32 x = (typename Of<N>::S32)a, y = (typename Of<N>::S32)b;
  return (x >> 16) * (y >> 16) + ((x << 16) >> 16) * ((y << 16) >> 16);
#endif
}

// sum += madd(a, b). Written out for AVX2, as a compiler that may order a long row of sums runs out of registers.
template <int N>
XEXPORT_INLINE void add_madd(typename Of<N>::S32& sum, typename Of<N>::S16 a, typename Of<N>::S16 b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (N == 32) {
    typename Of<N>::S32 products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "x"(b));
    return;
  }
#endif
  sum += madd<N>(a, b);
}

// The same of numbers below 128 and signed bytes of at most 127: lane i is u[2i] s[2i] + u[2i+1] s[2i+1], which can't
// overflow.
template <int N>
XEXPORT_INLINE typename Of<N>::S16 madd_bytes(typename Of<N>::U8 u, typename Of<N>::S8 s) {
#if defined(__AVX512BW__)
  if constexpr (N == 64) return (typename Of<N>::S16)_mm512_maddubs_epi16((__m512i)u, (__m512i)s);
#endif
#if defined(__AVX2__)
  if constexpr (N == 32) return (typename Of<N>::S16)_mm256_maddubs_epi16((__m256i)u, (__m256i)s);
  if constexpr (N == 16) return (typename Of<N>::S16)_mm_maddubs_epi16((__m128i)u, (__m128i)s);
#elif defined(__aarch64__)
  const int8x16_t x = (int8x16_t)u, y = (int8x16_t)s;
  return (typename Of<N>::S16)vpaddq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y)), vmull_high_s8(x, y));
#else
  const auto even = (typename Of<N>::S16)((typename Of<N>::U16)u & 255), odd = (typename Of<N>::S16)u >> 8;
  const auto x = (typename Of<N>::S16)s;
  return even * ((x << 8) >> 8) + odd * (x >> 8);
#endif
}

// Sums of neighbours: lane i is v[2i] + v[2i+1].
template <int N>
XEXPORT_INLINE typename Of<N>::S32 neighbours(typename Of<N>::S16 v) {
#if defined(__aarch64__)
  return (typename Of<N>::S32)vpaddlq_s16((int16x8_t)v);
#else
  return madd<N>(v, typename Of<N>::S16{} + 1);
#endif
}

// a b + c, rounded once where the machine can. A compiler may also write it apart, in one loop and not in the
// other; then they would differ in the last bit.
template <class V>
XEXPORT_INLINE V fused(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#endif
#if defined(__FMA__)
  if constexpr (sizeof(V) == 16) return (V)_mm_fmadd_ps((__m128)a, (__m128)b, (__m128)c);
  if constexpr (sizeof(V) == 32) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
#if defined(__aarch64__)
  return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// Element-wise sums of the 32-bit units of two vectors: {a0+a2, b0+b2, a1+a3, b1+b3} in every 16 bytes.
// Applied twice, to four vectors, it leaves the four sums of every 16 bytes in their lanes.
#if defined(__AVX2__)
template <class V>
XEXPORT_INLINE V pair_sums(V a, V b) {
  return (V)__builtin_shufflevector((Ints)a, (Ints)b, 0, 8, 1, 9, 4, 12, 5, 13) +
         (V)__builtin_shufflevector((Ints)a, (Ints)b, 2, 10, 3, 11, 6, 14, 7, 15);
}
template <class V>
XEXPORT_INLINE V four_sums(V a, V b, V c, V d) {
  const Ints x = (Ints)pair_sums(a, b), y = (Ints)pair_sums(c, d);
  return (V)__builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13) +
         (V)__builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15);
}
// The lower (upper) halves of two vectors.
template <class V>
XEXPORT_INLINE V lower(V a, V b) {
  return (V)__builtin_shufflevector((Ints)a, (Ints)b, 0, 1, 2, 3, 8, 9, 10, 11);
}
template <class V>
XEXPORT_INLINE V upper(V a, V b) {
  return (V)__builtin_shufflevector((Ints)a, (Ints)b, 4, 5, 6, 7, 12, 13, 14, 15);
}
// Lane i is the sum of the lanes of v[i], i < kGroup.
template <class V>
XEXPORT_INLINE V group_sums(const V* v) {
  const V low = four_sums(v[0], v[1], v[2], v[3]), high = four_sums(v[4], v[5], v[6], v[7]);
  return lower(low, high) + upper(low, high);
}
#else
template <class V>
XEXPORT_INLINE V pair_sums(V a, V b) {
  return (V)__builtin_shufflevector((Ints)a, (Ints)b, 0, 4, 1, 5) +
         (V)__builtin_shufflevector((Ints)a, (Ints)b, 2, 6, 3, 7);
}
template <class V>
XEXPORT_INLINE V four_sums(V a, V b, V c, V d) {
  const Ints x = (Ints)pair_sums(a, b), y = (Ints)pair_sums(c, d);
  return (V)__builtin_shufflevector(x, y, 0, 1, 4, 5) + (V)__builtin_shufflevector(x, y, 2, 3, 6, 7);
}
template <class V>
XEXPORT_INLINE V group_sums(const V* v) {
  return four_sums(v[0], v[1], v[2], v[3]);
}
#endif

// Rows of weights that are read together for few tokens: memory gives four sequential streams faster than one,
// and faster than eight with their scales.
constexpr int kRows = 4;
typedef Of<16>::S32 RowInts;
typedef Of<16>::F32 RowFloats;

// The sums of kRows vectors, one a lane.
template <class V>
XEXPORT_INLINE auto row_sums(const V* v) {
  const V sums = four_sums(v[0], v[1], v[2], v[3]);
#if defined(__AVX2__)
  return __builtin_shufflevector(sums, sums, 0, 1, 2, 3) + __builtin_shufflevector(sums, sums, 4, 5, 6, 7);
#else
  return sums;
#endif
}

// Keeps a value in a register: without it the compiler reads memory once for every use.
template <class V>
XEXPORT_INLINE V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// kGroup vectors of 32-bit lanes, transposed in registers.
XEXPORT_INLINE void transpose_group(Ints* v) {
  Ints t[kGroup];
#if defined(__AVX2__)
  Ints u[kGroup];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[2 * i + 1] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int h = 0; h < 8; h += 4) {
    for (int i = 0; i < 2; ++i) {
      u[h + 2 * i] = __builtin_shufflevector(t[h + i], t[h + 2 + i], 0, 1, 8, 9, 4, 5, 12, 13);
      u[h + 2 * i + 1] = __builtin_shufflevector(t[h + i], t[h + 2 + i], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = lower(u[i], u[4 + i]);
    v[4 + i] = upper(u[i], u[4 + i]);
  }
#else
  for (int i = 0; i < 2; ++i) {
    t[2 * i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 4, 1, 5);
    t[2 * i + 1] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 6, 3, 7);
  }
  for (int i = 0; i < 2; ++i) {
    v[2 * i] = __builtin_shufflevector(t[i], t[2 + i], 0, 1, 4, 5);
    v[2 * i + 1] = __builtin_shufflevector(t[i], t[2 + i], 2, 3, 6, 7);
  }
#endif
}

// In every 16 bytes, four vectors of 32-bit lanes transposed.
XEXPORT_INLINE void transpose_fours(Ints* v) {
#if defined(__AVX2__)
  const Ints a = __builtin_shufflevector(v[0], v[1], 0, 8, 1, 9, 4, 12, 5, 13);
  const Ints b = __builtin_shufflevector(v[0], v[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const Ints c = __builtin_shufflevector(v[2], v[3], 0, 8, 1, 9, 4, 12, 5, 13);
  const Ints d = __builtin_shufflevector(v[2], v[3], 2, 10, 3, 11, 6, 14, 7, 15);
  v[0] = __builtin_shufflevector(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
  v[1] = __builtin_shufflevector(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
  v[2] = __builtin_shufflevector(b, d, 0, 1, 8, 9, 4, 5, 12, 13);
  v[3] = __builtin_shufflevector(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
#else
  transpose_group(v);
#endif
}

// Lane r is p[r * stride], for the rows below `count`; the others repeat the last.
XEXPORT_INLINE Floats column(const float* p, int64_t stride, int64_t count) {
  Floats v;
  for (int r = 0; r < kGroup; ++r) v[r] = p[(r < count ? r : count - 1) * stride];
  return v;
}

XEXPORT_INLINE Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }
XEXPORT_INLINE Floats all_floats(float x) { return x - Floats{}; }
XEXPORT_INLINE Ints all_ints(int32_t x) { return x - Ints{}; }

}  // namespace xexport::XEXPORT_ISA
