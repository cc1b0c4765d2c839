// Products with 6-bit weights, in blocks of 32 with a scale each, and activations rounded to 8 bits.
//
//   y[n] = sum over blocks of  scale_w[n,b] * scale_x[b] * ( sum_k w[n,k] x[k]  -  32 sum_k x[k] )
//
// w are the unsigned codes. Of a row 16 follow one another in twelve bytes, three vectors of eight rows: the low six
// bits of each vector are four codes of every row, and its high two bits a third of four more. So four vectors of
// codes take 11 operations, where four bits here and two there would take 17.
// Sums of products of bytes are kept in 16 bits while they are exact: 2 * 63 * 127 * 2 < 2^15.
#include "loops.h"

#include "../native/interleaved_loops.h"
#include "../native/tile.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int64_t kMany = 12;  // tokens from which panels earn back their packing
constexpr int64_t kUnits = 2;  // of a block: 16 codes of every row
constexpr int kStored = 3;     // vectors of a unit
constexpr int kQuads = 4;      // of codes

typedef Of<kBytes>::U8 WideBytes;
typedef Of<kBytes>::S8 WideSigned;

int64_t row_bytes(int64_t blocks, int64_t block) { return blocks * block; }
int64_t scratch_size(const Product&) { return kPanels * kPanel * kDeep / 4 + 64; }

void quantize(const float* x, int64_t depth, int64_t blocks, int64_t, uint8_t* codes, float* scales,
              int32_t* offsets) {
  constexpr int kVectors = kBlock / kGroup;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = b * kBlock, left = depth - at < kBlock ? depth - at : kBlock;
    const Rounding rounding = rounding_of(x + at, left, 127.0f);
    scales[b] = rounding.scale;
    Ints v[kVectors], total = {};
    for (int i = 0; i < kVectors; ++i) total += v[i] = rounded(rounding, x + at, i * kGroup, left);
    for (int i = 0; i < kVectors; i += 4) write(codes + at + i * kGroup, low_bytes(v + i));
    offsets[b] = 32 * sum_of(total);
  }
}

// The four vectors of codes in three, which are kUnitBytes apart.
XEXPORT_INLINE void unpack(const uint8_t* from, Bytes* codes) {
  constexpr int kLow = 0x3f, kHigh = 0xc0;
  Bytes rest = {};
#pragma GCC unroll 3
  for (int i = 0; i < kStored; ++i) {
    const Bytes v = in_register(read<Bytes>(from + i * kUnitBytes));
    codes[i] = v & kLow;
    // no bit crosses from one byte to the next: the lowest two of each are zero
    rest = (Bytes)((Words)(rest | (v & kHigh)) >> 2);
  }
  codes[kStored] = rest;
}

struct Format {
  static constexpr int64_t kBlockBytes = kUnits * kStored * kUnitBytes;

  template <int Streams, bool Ahead>
  XEXPORT_INLINE void block(const uint8_t* const* codes, int64_t at, const uint8_t* x, Ints (*sums)[kParts]) {
#pragma GCC unroll 2
    for (int u = 0; u < kUnits; ++u) {
      Signed a[kQuads];
      for (int q = 0; q < kQuads; ++q) a[q] = everywhere(x + 4 * (kQuads * u + q));
#pragma GCC unroll 4
      for (int s = 0; s < Streams; ++s) {
        const uint8_t* from = codes[s] + at + u * kStored * kUnitBytes;
        // two lines of a block, then its third
        for (int line = 2 * u; Ahead && line < 2 + u; ++line) prefetch(codes[s] + at + kAhead + 64 * line);
        for (int i = 0; i < kParts; ++i) {
          Bytes w[kQuads];
          unpack(from + i * kNarrow, w);
          const Shorts low = madd_bytes<kNarrow>(w[0], a[0]) + madd_bytes<kNarrow>(w[1], a[1]);
          const Shorts high = madd_bytes<kNarrow>(w[2], a[2]) + madd_bytes<kNarrow>(w[3], a[3]);
          const Ints sum = neighbours<kNarrow>(low) + neighbours<kNarrow>(high);
          sums[s][i] = u == 0 ? sum : in_register(sums[s][i] + sum);
        }
      }
    }
  }

  // Codes [from, to) of a panel's rows, as groups of four bytes with one row a lane: as they lie, but unpacked.
  static void pack(const Product& p, int64_t first, int64_t from, int64_t to, uint8_t* panel) {
    for (int64_t n = 0; n < kPanel; n += kTogether) {
      const uint8_t* codes = p.codes + group_of(p, first + n) * p.blocks * kBlockBytes;
      uint8_t* out = panel + n * 4;
      for (int64_t unit = from / kBlock * kUnits; unit < to / kBlock * kUnits; ++unit, out += kQuads * kPanel * 4) {
        for (int i = 0; i < kParts; ++i) {
          Bytes w[kQuads];
          unpack(codes + unit * kStored * kUnitBytes + i * kNarrow, w);
          for (int q = 0; q < kQuads; ++q) write(out + q * kPanel * 4 + i * kNarrow, w[q]);
        }
      }
    }
  }

  static float scale(const Product& p, int64_t row, int64_t b) { return interleaved_scale(p, row, b); }

  XEXPORT_INLINE void sums(const uint8_t* panel, int64_t, const uint8_t* const* x, const int32_t* const* offsets,
                           int64_t b, IntVec (*sums)[kWidth]) {
// one vector of columns after the other: with the sums of both, AVX2's registers would not hold the rest
#pragma GCC unroll 2
    for (int v = 0; v < kWidth; ++v) {
      IntVec part[kTall];
#pragma GCC unroll 12
      for (int t = 0; t < kTall; ++t) part[t] = IntVec{} - offsets[t][b];
#pragma GCC unroll 1
      for (int64_t k = 0; k < kBlock; k += 8) {
        const uint8_t* w = panel + k * kPanel + v * kBytes;
        const WideBytes one = in_register(read<WideBytes>(w)), other = in_register(read<WideBytes>(w + 4 * kPanel));
#pragma GCC unroll 12
        for (int t = 0; t < kTall; ++t) {
          const auto a = (WideSigned)(read<int32_t>(x[t] + k) - IntVec{});
          const auto c = (WideSigned)(read<int32_t>(x[t] + k + 4) - IntVec{});
          part[t] += neighbours<kBytes>(madd_bytes<kBytes>(one, a) + madd_bytes<kBytes>(other, c));
        }
      }
#pragma GCC unroll 12
      for (int t = 0; t < kTall; ++t) sums[t][v] = part[t];
    }
  }
};

}  // namespace

const ProductLoops linear_int6x8_loops = {
    kTogether, kPanels * kPanel, kMany, row_bytes, scratch_size, quantize, interleaved_rows<Format>,
    quantized_tile<Format>};

}  // namespace xexport::XEXPORT_ISA
