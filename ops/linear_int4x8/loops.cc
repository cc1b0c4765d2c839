// Products with 4-bit weights, in blocks of 32 with a scale each, and activations rounded to 8 bits.
//
//   y[n] = sum over blocks of  scale_w[n,b] * scale_x[b] * ( sum_k w[n,k] x[k]  -  8 sum_k x[k] )
//
// w are the unsigned codes as they lie in the file: eight rows together, a block of them being four vectors that
// have four bytes of every row. Low halves are codes 0, 2, 4, 6 of eight, high ones 1, 3, 5, 7. So a row is a lane,
// four activations in every lane serve all rows, and nothing is ever moved between lanes. The activations of a block
// lie as its 16 even, then its 16 odd elements.
// Sums of products of bytes are kept in 16 bits while they are exact: 8 * 15 * 127 * 2 < 2^15.
#include "loops.h"

#include "../native/half.h"
#include "../native/round.h"
#include "../native/tile.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int64_t kMany = 12;          // tokens from which panels earn back their packing
constexpr int64_t kAhead = 1024;       // bytes of a stream that are prefetched
constexpr int64_t kScalesAhead = 256;  // scales
constexpr int64_t kBlock = 32;
constexpr int64_t kTogether = 8;  // rows that lie together
constexpr int64_t kUnits = 4;     // of a block: eight codes of every row
constexpr int64_t kUnitBytes = kTogether * 4;
constexpr int64_t kBlockBytes = kUnits * kUnitBytes;  // of eight rows
constexpr int kParts = kTogether / kGroup;            // vectors of eight rows
constexpr int kStreams = 4;  // that are read side by side: memory gives several faster than one

typedef Of<kNarrow>::S8 Signed;
typedef Of<kBytes>::U8 WideBytes;
typedef Of<kBytes>::S8 WideSigned;
typedef Of<kBytes>::S16 WideShorts;

int64_t row_bytes(int64_t blocks, int64_t block) { return blocks * block; }
int64_t scratch_size(const Product&) { return kPanels * kPanel * kDeep / 4 + 64; }

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

void quantize(const float* x, int64_t depth, int64_t blocks, int64_t, uint8_t* codes, float* scales,
              int32_t* offsets) {
  constexpr int kVectors = kBlock / kGroup;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = b * kBlock, left = depth - at < kBlock ? depth - at : kBlock;
    const Rounding rounding = rounding_of(x + at, left, 127.0f);
    scales[b] = rounding.scale;
    Ints v[kVectors], halves[kVectors], total = {};
    for (int i = 0; i < kVectors; ++i) total += v[i] = rounded(rounding, x + at, i * kGroup, left);
    for (int i = 0; i < kVectors; i += 2) split(v[i], v[i + 1], halves[i / 2], halves[(kVectors + i) / 2]);
    for (int i = 0; i < kVectors; i += 4) write(codes + at + i * kGroup, low_bytes(halves + i));
    offsets[b] = 8 * sum_of(total);
  }
}

// Four activations in every lane.
XEXPORT_INLINE Signed everywhere(const uint8_t* x) { return (Signed)(read<int32_t>(x) - Ints{}); }

// Eight rows at each of `Streams` places (of `codes` and of `scales`) with one token, to y of each place.
template <int Streams, bool Ahead>
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
    Shorts sums[Streams][kParts] = {};
#pragma GCC unroll 4
    for (int u = 0; u < kUnits; ++u) {
      const Signed even = everywhere(x + b * kBlock + 4 * u), odd = everywhere(x + b * kBlock + 16 + 4 * u);
#pragma GCC unroll 4
      for (int s = 0; s < Streams; ++s) {
        const uint8_t* from = codes[s] + b * kBlockBytes + u * kUnitBytes;
        if (Ahead && u % 2 == 0) prefetch(from + kAhead);
        for (int i = 0; i < kParts; ++i) {
          const Bytes v = in_register(read<Bytes>(from + i * kNarrow));
          const Bytes low = v & 15, high = (Bytes)((Words)v >> 4) & 15;
          sums[s][i] = in_register(sums[s][i] + madd_nibbles<kNarrow>(low, even));
          sums[s][i] = in_register(sums[s][i] + madd_nibbles<kNarrow>(high, odd));
        }
      }
    }
    const Floats x_scale = all_floats(x_scales[b]);
    const Ints offset = all_ints(offsets[b]);
    for (int s = 0; s < Streams; ++s) {
      if (Ahead && b % 4 == 0) prefetch(scales[s] + b * kTogether + kScalesAhead);
      for (int i = 0; i < kParts; ++i) {
        const Ints total = madd<kNarrow>(sums[s][i], Shorts{} + 1) - offset;
        const Floats scale = read_halves(scales[s] + b * kTogether + i * kGroup) * x_scale;
        result[s][i] = fused<Floats>(to_floats(total), scale, result[s][i]);
      }
    }
  }
}

// Groups of eight rows group, group + step ..., with every token.
template <int Streams>
void tokens(const Product& p, int64_t group, int64_t step) {
  const uint8_t* codes[Streams];
  const uint16_t* scales[Streams];
  for (int s = 0; s < Streams; ++s) {
    const int64_t line = group + s * step;
    codes[s] = p.codes + line * p.blocks * kBlockBytes;
    scales[s] = static_cast<const uint16_t*>(p.scales) + line * p.blocks * kTogether;
  }
  for (int64_t t = 0; t < p.tokens; ++t) {
    Floats result[Streams][kParts];
    if (t == 0) {
      together<Streams, true>(p, codes, scales, t, result);
    } else {
      together<Streams, false>(p, codes, scales, t, result);
    }
    for (int s = 0; s < Streams; ++s) {
      const int64_t row = (group + s * step) * kTogether, left = p.columns - row;
      std::memcpy(p.y + t * p.columns + row, result[s], static_cast<size_t>(left < kTogether ? left : kTogether) * 4);
    }
  }
}

// Groups that are a part of the job apart are read side by side, so that each place's follow one another in memory.
void rows(const Product& p, int64_t first, int64_t last, float*) {
  const int64_t begin = first / kTogether, end = (last + kTogether - 1) / kTogether;
  const int64_t step = (end - begin) / kStreams;
  for (int64_t i = 0; i < step; ++i) tokens<kStreams>(p, begin + i, step);
  for (int64_t i = begin + step * kStreams; i < end; ++i) tokens<1>(p, i, 0);
}

struct Format {
  // Codes [from, to) of a panel's rows, as groups of four bytes with one row a lane: as they lie, but unpacked.
  static void pack(const Product& p, int64_t first, int64_t from, int64_t to, uint8_t* panel) {
    const int64_t groups = (p.columns + kTogether - 1) / kTogether;
    for (int64_t n = 0; n < kPanel; n += kTogether) {
      const int64_t group = (first + n) / kTogether < groups ? (first + n) / kTogether : groups - 1;
      const uint8_t* codes = p.codes + group * p.blocks * kBlockBytes;
      uint8_t* out = panel + n * 4;
      for (int64_t b = from / kBlock; b < to / kBlock; ++b, out += kBlock * kPanel) {
        for (int u = 0; u < kUnits; ++u) {
          for (int i = 0; i < kParts; ++i) {
            const Bytes v = read<Bytes>(codes + b * kBlockBytes + u * kUnitBytes + i * kNarrow);
            write(out + u * kPanel * 4 + i * kNarrow, v & 15);
            write(out + (kUnits + u) * kPanel * 4 + i * kNarrow, (Bytes)((Words)v >> 4) & 15);
          }
        }
      }
    }
  }

  static float scale(const Product& p, int64_t row, int64_t b) {
    const int64_t at = (row / kTogether * p.blocks + b) * kTogether + row % kTogether;
    return half_to_float(static_cast<const uint16_t*>(p.scales)[at]);
  }

  XEXPORT_INLINE void sums(const uint8_t* panel, int64_t, const uint8_t* const* x, const int32_t* const* offsets,
                           int64_t b, IntVec (*sums)[kWidth]) {
    WideShorts parts[kTall][kWidth] = {};
    for (int64_t k = 0; k < kBlock; k += 4) {
      WideBytes w[kWidth];
      for (int v = 0; v < kWidth; ++v) w[v] = read<WideBytes>(panel + k * kPanel + v * kBytes);
#pragma GCC unroll 12
      for (int t = 0; t < kTall; ++t) {
        const auto a = (WideSigned)(read<int32_t>(x[t] + k) - IntVec{});
        for (int v = 0; v < kWidth; ++v) parts[t][v] += madd_nibbles<kBytes>(w[v], a);
      }
    }
    const WideShorts ones = WideShorts{} + 1;
#pragma GCC unroll 12
    for (int t = 0; t < kTall; ++t) {
      for (int v = 0; v < kWidth; ++v) sums[t][v] = madd<kBytes>(parts[t][v], ones) - offsets[t][b];
    }
  }
};

}  // namespace

const ProductLoops linear_int4x8_loops = {kTogether,    kPanels * kPanel, kMany, row_bytes,
                                          scratch_size, quantize,         rows,  quantized_tile<Format>};

}  // namespace xexport::XEXPORT_ISA
