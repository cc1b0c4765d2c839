// Products with 4-bit weights, in blocks of 32 with a scale each, and activations rounded to 8 bits.
//
//   y[n] = sum over blocks of  scale_w[n,b] * scale_x[b] * ( sum_k w[n,k] x[k]  -  8 sum_k x[k] )
//
// w are the unsigned codes as they lie in the file: eight rows together, a block of them being four vectors that
// have four bytes of every row. Low halves are codes 0, 2, 4, 6 of eight, high ones 1, 3, 5, 7. The activations of a
// block lie as its 16 even, then its 16 odd elements.
// Sums of products of bytes are kept in 16 bits while they are exact: 8 * 15 * 127 * 2 < 2^15.
#include "loops.h"

#include "../native/interleaved_loops.h"
#include "../native/tile.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int64_t kMany = 12;  // tokens from which panels earn back their packing
constexpr int64_t kUnits = 4;  // of a block: eight codes of every row

typedef Of<kBytes>::U8 WideBytes;
typedef Of<kBytes>::S8 WideSigned;
typedef Of<kBytes>::S16 WideShorts;

int64_t row_bytes(int64_t blocks, int64_t block) { return blocks * block; }
int64_t scratch_size(const Product&) { return kPanels * kPanel * kDeep / 4 + 64; }

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

struct Format {
  static constexpr int64_t kBlockBytes = kUnits * kUnitBytes;

  template <int Streams, bool Ahead>
  XEXPORT_INLINE void block(const uint8_t* const* codes, int64_t at, const uint8_t* x,
                                   Ints (*totals)[kParts]) {
    Shorts sums[Streams][kParts] = {};
#pragma GCC unroll 4
    for (int u = 0; u < kUnits; ++u) {
      const Signed even = everywhere(x + 4 * u), odd = everywhere(x + 16 + 4 * u);
#pragma GCC unroll 4
      for (int s = 0; s < Streams; ++s) {
        const uint8_t* from = codes[s] + at + u * kUnitBytes;
        if (Ahead && u % 2 == 0) prefetch(from + kAhead);
        for (int i = 0; i < kParts; ++i) {
          const Bytes v = in_register(read<Bytes>(from + i * kNarrow));
          const Bytes low = v & 15, high = (Bytes)((Words)v >> 4) & 15;
          sums[s][i] = in_register(sums[s][i] + madd_bytes<kNarrow>(low, even));
          sums[s][i] = in_register(sums[s][i] + madd_bytes<kNarrow>(high, odd));
        }
      }
    }
    for (int s = 0; s < Streams; ++s) {
      for (int i = 0; i < kParts; ++i) totals[s][i] = neighbours<kNarrow>(sums[s][i]);
    }
  }

  // Codes [from, to) of a panel's rows, as groups of four bytes with one row a lane: as they lie, but unpacked.
  static void pack(const Product& p, int64_t first, int64_t from, int64_t to, uint8_t* panel) {
    for (int64_t n = 0; n < kPanel; n += kTogether) {
      const uint8_t* codes = p.codes + group_of(p, first + n) * p.blocks * kBlockBytes;
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

  static float scale(const Product& p, int64_t row, int64_t b) { return interleaved_scale(p, row, b); }

  XEXPORT_INLINE void sums(const uint8_t* panel, int64_t, const uint8_t* const* x,
                                  const int32_t* const* offsets, int64_t b, IntVec (*sums)[kWidth]) {
    WideShorts parts[kTall][kWidth] = {};
    for (int64_t k = 0; k < kBlock; k += 4) {
      WideBytes w[kWidth];
      for (int v = 0; v < kWidth; ++v) w[v] = read<WideBytes>(panel + k * kPanel + v * kBytes);
#pragma GCC unroll 12
      for (int t = 0; t < kTall; ++t) {
        const auto a = (WideSigned)(read<int32_t>(x[t] + k) - IntVec{});
        for (int v = 0; v < kWidth; ++v) parts[t][v] += madd_bytes<kBytes>(w[v], a);
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < kTall; ++t) {
      for (int v = 0; v < kWidth; ++v) sums[t][v] = neighbours<kBytes>(parts[t][v]) - offsets[t][b];
    }
  }
};

}  // namespace

const ProductLoops linear_int4x8_loops = {
    kTogether, kPanels * kPanel, kMany, row_bytes, scratch_size, quantize, interleaved_rows<Format>,
    quantized_tile<Format>};

}  // namespace xexport::XEXPORT_ISA
