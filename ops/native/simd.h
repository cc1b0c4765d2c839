// Vectors of floats for the loops, in the width of the instruction set that the file is compiled for.
//
// Included by loops.cc files only. Everything lives in a namespace of the instruction set and nothing of
// the standard library is instantiated, so that no function compiled for AVX can end up being called by
// code for an older machine. GCC and Clang turn these vector types into SSE, AVX, AVX-512 or NEON.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#ifndef XEXPORT_ISA
#error "loops are compiled once per instruction set, with -DXEXPORT_ISA=<its name>"
#endif

namespace xexport::XEXPORT_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;

typedef float Vec __attribute__((vector_size(kBytes)));
typedef int32_t IntVec __attribute__((vector_size(kBytes)));
typedef float LooseVec __attribute__((vector_size(kBytes), aligned(4), may_alias));

using Lanes = std::make_integer_sequence<int, kLanes>;

#define XEXPORT_INLINE static inline __attribute__((always_inline))

XEXPORT_INLINE Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
XEXPORT_INLINE void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
// x in every lane. Written so that it becomes one broadcast; a loop over lanes does not.
XEXPORT_INLINE Vec all(float x) { return x - Vec{}; }

// The first n lanes from memory, zeros behind.
XEXPORT_INLINE Vec load_part(const float* p, int64_t n) {
  alignas(kBytes) float lanes[kLanes] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof(float));
  return load(lanes);
}
XEXPORT_INLINE void store_part(float* p, Vec v, int64_t n) {
  alignas(kBytes) float lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof(float));
}

template <int Distance, int... I>
XEXPORT_INLINE Vec swapped(Vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ Distance)...);
}
template <int... I>
XEXPORT_INLINE Vec reversed(Vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (kLanes - 1 - I)...);
}
XEXPORT_INLINE Vec reversed(Vec v) { return reversed(v, Lanes{}); }

XEXPORT_INLINE Vec magnitude(Vec x) {
  IntVec bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits &= 0x7fffffff;
  Vec result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// The sum of all lanes.
XEXPORT_INLINE float sum(Vec v) {
  if constexpr (kLanes >= 16) v += swapped<8>(v, Lanes{});
  if constexpr (kLanes >= 8) v += swapped<4>(v, Lanes{});
  v += swapped<2>(v, Lanes{});
  v += swapped<1>(v, Lanes{});
  return v[0];
}

// Whether a comparison (-1 or 0 in each lane) holds in every lane.
XEXPORT_INLINE bool in_every_lane(IntVec condition) {
#if defined(__AVX512F__)
  return __builtin_ia32_cvtd2mask512(condition) == 0xffff;
#elif defined(__AVX2__)
  return __builtin_ia32_movmskps256(reinterpret_cast<Vec>(condition)) == 0xff;
#elif defined(__SSE2__)
  return __builtin_ia32_movmskps(reinterpret_cast<Vec>(condition)) == 0xf;
#else
  int32_t every = -1;
  for (int i = 0; i < kLanes; ++i) every &= condition[i];
  return every != 0;
#endif
}

// One step of a transposition: exchanges the off-diagonal blocks of Size x Size of two rows.
template <int Size, int... I>
XEXPORT_INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, I...>) {
  const Vec low = __builtin_shufflevector(a, b, (I / Size % 2 == 0 ? I : kLanes + I - Size)...);
  const Vec high = __builtin_shufflevector(a, b, (I / Size % 2 == 0 ? I + Size : kLanes + I)...);
  a = low;
  b = high;
}
template <int Size>
XEXPORT_INLINE void exchange_all(Vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i / Size % 2 == 0) exchange<Size>(rows[i], rows[i + Size], Lanes{});
  }
}
// kLanes rows become kLanes columns, in registers.
XEXPORT_INLINE void transpose(Vec* rows) {
  if constexpr (kLanes >= 16) exchange_all<8>(rows);
  if constexpr (kLanes >= 8) exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
}

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns.
static inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                             int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      if (r + kLanes <= rows && c + kLanes <= columns) {
        Vec tile[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) tile[i] = load(from + (r + i) * from_stride + c);
        transpose(tile);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + (c + i) * to_stride + r, tile[i]);
      } else {
        for (int64_t i = r; i < r + kLanes && i < rows; ++i) {
          for (int64_t j = c; j < c + kLanes && j < columns; ++j) {
            to[j * to_stride + i] = from[i * from_stride + j];
          }
        }
      }
    }
  }
}

}  // namespace xexport::XEXPORT_ISA
