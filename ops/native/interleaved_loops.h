// Products of few tokens with weights of which eight rows lie interleaved: a row is a lane, so four activations in
// every lane serve all rows, and nothing is ever moved between lanes. Blocks of 32 weights have a float16 scale, and
// activations are rounded to 8 bits a block.
//
// A format has
//   static constexpr int64_t kBlockBytes;   of eight rows
//   template <int Streams, bool Ahead>
//   static void block(const uint8_t* const* codes, int64_t at, const uint8_t* x, Ints (*sums)[kParts]);
//     the products of a block, `at` bytes from each of `Streams` places, with the token's numbers at x; `Ahead` asks
//     for what comes later
#pragma once

#include "dot.h"
#include "half.h"
#include "products.h"
#include "round.h"

namespace xexport::XEXPORT_ISA {

constexpr int64_t kAhead = 1024;       // bytes of a stream that are prefetched
constexpr int64_t kScalesAhead = 256;  // scales
constexpr int64_t kBlock = 32;
constexpr int64_t kTogether = 8;                  // rows that lie together
constexpr int64_t kUnitBytes = kTogether * 4;     // four bytes of every row
constexpr int kParts = kTogether / kGroup;        // vectors of eight rows
constexpr int kStreams = 4;  // that are read side by side: memory gives several faster than one

typedef Of<kNarrow>::S8 Signed;

// Four activations in every lane.
XEXPORT_INLINE Signed everywhere(const uint8_t* x) { return (Signed)(read<int32_t>(x) - Ints{}); }

// The low bytes of four vectors, in order.
XEXPORT_INLINE Signed low_bytes(const Ints* v) {
  const auto a = (Signed)low_halves(v[0], v[1]), b = (Signed)low_halves(v[2], v[3]);
#if defined(__AVX2__)
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40,
                                 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62);
#else
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#endif
}

// Eight rows at each of `Streams` places (of `codes` and of `scales`) with one token, to y of each place.
template <class Format, int Streams, bool Ahead>
XEXPORT_INLINE void together(const Product& p, const uint8_t* const* codes, const uint16_t* const* scales,
                             int64_t token, Floats (*result)[kParts]) {
  const uint8_t* x = p.quantized.codes + token * p.quantized.row_bytes;
  const float* x_scales = p.quantized.scales + token * p.blocks;
  const int32_t* offsets = p.quantized.offsets + token * p.blocks;
  for (int s = 0; s < Streams; ++s) {
    for (int i = 0; i < kParts; ++i) result[s][i] = Floats{};
  }
#pragma GCC unroll 1
  for (int64_t b = 0; b < p.blocks; ++b) {
    Ints sums[Streams][kParts];
    Format::template block<Streams, Ahead>(codes, b * Format::kBlockBytes, x + b * kBlock, sums);
    const Floats x_scale = all_floats(x_scales[b]);
    const Ints offset = all_ints(offsets[b]);
    for (int s = 0; s < Streams; ++s) {
      if (Ahead && b % 4 == 0) prefetch(scales[s] + b * kTogether + kScalesAhead);
      for (int i = 0; i < kParts; ++i) {
        const Floats scale = read_halves(scales[s] + b * kTogether + i * kGroup) * x_scale;
        result[s][i] = fused<Floats>(to_floats(sums[s][i] - offset), scale, result[s][i]);
      }
    }
  }
}

// Groups of eight rows group, group + step ..., with every token.
template <class Format, int Streams>
void interleaved_tokens(const Product& p, int64_t group, int64_t step) {
  const uint8_t* codes[Streams];
  const uint16_t* scales[Streams];
  for (int s = 0; s < Streams; ++s) {
    const int64_t line = group + s * step;
    codes[s] = p.codes + line * p.blocks * Format::kBlockBytes;
    scales[s] = static_cast<const uint16_t*>(p.scales) + line * p.blocks * kTogether;
  }
  for (int64_t t = 0; t < p.tokens; ++t) {
    Floats result[Streams][kParts];
    if (t == 0) {
      together<Format, Streams, true>(p, codes, scales, t, result);
    } else {
      together<Format, Streams, false>(p, codes, scales, t, result);
    }
    for (int s = 0; s < Streams; ++s) {
      const int64_t row = (group + s * step) * kTogether, left = p.columns - row;
      std::memcpy(p.y + t * p.columns + row, result[s], static_cast<size_t>(left < kTogether ? left : kTogether) * 4);
    }
  }
}

// Groups that are a part of the job apart are read side by side, so that each place's follow one another in memory.
template <class Format>
void interleaved_rows(const Product& p, int64_t first, int64_t last, float*) {
  const int64_t begin = first / kTogether, end = (last + kTogether - 1) / kTogether;
  const int64_t step = (end - begin) / kStreams;
  for (int64_t i = 0; i < step; ++i) interleaved_tokens<Format, kStreams>(p, begin + i, step);
  for (int64_t i = begin + step * kStreams; i < end; ++i) interleaved_tokens<Format, 1>(p, i, 0);
}

// The group that has row n, or the last one.
XEXPORT_INLINE int64_t group_of(const Product& p, int64_t n) {
  const int64_t groups = (p.columns + kTogether - 1) / kTogether;
  return n / kTogether < groups ? n / kTogether : groups - 1;
}

inline float interleaved_scale(const Product& p, int64_t row, int64_t b) {
  const int64_t at = (row / kTogether * p.blocks + b) * kTogether + row % kTogether;
  return half_to_float(static_cast<const uint16_t*>(p.scales)[at]);
}

}  // namespace xexport::XEXPORT_ISA
