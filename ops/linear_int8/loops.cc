// Products with 8-bit weights, in blocks with a scale each, and activations rounded to 16 bits.
//
//   y[n] = sum over blocks of  scale_w[n,b] * scale_x[b] * ( sum_k w[n,k] x[k]  -  128 sum_k x[k] )
//
// w are the unsigned codes as they lie in the file. The inner sums are exact in 32 bits for blocks up to 128
// (255 * 32767 * 128 < 2^31). Taken as halfwords, a vector of codes holds the even ones in its low bytes and
// the odd ones in its high bytes; so the activations lie as vectors of even and of odd elements, and neither
// loop has to move bytes between lanes.
#include "loops.h"

#include "../native/dot.h"
#include "../native/round.h"
#include "../native/tile.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int64_t kMany = 12;    // tokens from which panels earn back their packing
constexpr int64_t kAhead = 512;  // bytes of a row that are prefetched
constexpr int64_t kScalesAhead = 32;

constexpr int64_t kUnits = 2;  // of a panel that a loop takes at once

typedef Of<kBytes>::S16 WideShorts;

int64_t row_bytes(int64_t blocks, int64_t block) { return blocks * block * 2; }
int64_t scratch_size(const Product&) { return kPanels * kPanel * kDeep / 2 + 64; }

void quantize(const float* x, int64_t depth, int64_t blocks, int64_t block, uint8_t* codes, float* scales,
              int32_t* offsets) {
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = b * block, left = depth - at < block ? depth - at : block;
    const Rounding rounding = rounding_of(x + at, left, 32767.0f);
    scales[b] = rounding.scale;
    Ints total = {};
    for (int64_t k = 0; k < block; k += kNarrow) {
      Ints v[4];
      for (int i = 0; i < 4; ++i) v[i] = rounded(rounding, x + at, k + i * kGroup, left);
      Ints even[2], odd[2];
      for (int i = 0; i < 2; ++i) {
        total += v[2 * i] + v[2 * i + 1];
        split(v[2 * i], v[2 * i + 1], even[i], odd[i]);
      }
      write(codes + (at + k) * 2, low_halves(even[0], even[1]));
      write(codes + (at + k) * 2 + kNarrow, low_halves(odd[0], odd[1]));
    }
    offsets[b] = 128 * sum_of(total);
  }
}

// The sums of one block of kRows rows with Tokens tokens, x[t] being where the token's block is.
template <int Tokens, bool Ahead>
XEXPORT_INLINE void block_sums(const uint8_t* const* w, int64_t block, const uint8_t* const* x,
                               RowInts* sums) {
  Ints parts[Tokens][kRows] = {};
#pragma GCC unroll 1
  for (int64_t k = 0; k < block; k += kNarrow) {
    Shorts even[Tokens], odd[Tokens];
    for (int t = 0; t < Tokens; ++t) {
      even[t] = read<Shorts>(x[t] + k * 2);
      odd[t] = read<Shorts>(x[t] + k * 2 + kNarrow);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      if (Ahead) prefetch(w[r] + k + kAhead);
      const Words v = in_register(read<Words>(w[r] + k));
      const Shorts low = (Shorts)(v & 255), high = (Shorts)(v >> 8);
      for (int t = 0; t < Tokens; ++t) {
        parts[t][r] = in_register(parts[t][r] + madd<kNarrow>(low, even[t]));
        parts[t][r] = in_register(parts[t][r] + madd<kNarrow>(high, odd[t]));
      }
    }
  }
  for (int t = 0; t < Tokens; ++t) sums[t] = row_sums(parts[t]);
}

// The product of kRows rows of weights, row, row + step, row + 2 step ..., of which `count` exist, with Tokens
// tokens. One by one the rows would be too short for the processor to see where they lead, so `step` makes
// each lane's rows follow one another in memory.
template <int Tokens>
XEXPORT_INLINE void group(const Product& p, int64_t row, int64_t step, int64_t count, int64_t token) {
  const uint8_t* w[kRows];
  const float* scales[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t line = row + (r < count ? r : count - 1) * step;
    w[r] = p.codes + line * p.blocks * p.block;
    scales[r] = static_cast<const float*>(p.scales) + line * p.blocks;
    if (Tokens == 1) prefetch(scales[r] + kScalesAhead);
  }
  const uint8_t* x[Tokens];
  for (int t = 0; t < Tokens; ++t) x[t] = p.quantized.codes + (token + t) * p.quantized.row_bytes;
  RowFloats result[Tokens] = {};
  for (int64_t b = 0; b < p.blocks; ++b) {
    RowInts sums[Tokens];
    if (p.block == 128) {
      block_sums<Tokens, Tokens == 1>(w, 128, x, sums);
    } else {
      block_sums<Tokens, Tokens == 1>(w, p.block, x, sums);
    }
    const RowFloats scale = {scales[0][b], scales[1][b], scales[2][b], scales[3][b]};
    for (int t = 0; t < Tokens; ++t) {
      const int64_t at = (token + t) * p.blocks + b;
      const RowInts sum = sums[t] - p.quantized.offsets[at];
      result[t] = fused<RowFloats>(__builtin_convertvector(sum, RowFloats), scale * p.quantized.scales[at], result[t]);
      x[t] += p.block * 2;
    }
    for (int r = 0; r < kRows; ++r) w[r] += p.block;
  }
  for (int t = 0; t < Tokens; ++t) {
    float* y = p.y + (token + t) * p.columns + row;
    for (int64_t r = 0; r < count; ++r) y[r * step] = result[t][r];
  }
}

void tokens(const Product& p, int64_t row, int64_t step, int64_t count) {
  int64_t t = 0;
  for (; t + 3 <= p.tokens; t += 3) group<3>(p, row, step, count, t);
  if (p.tokens - t == 2) group<2>(p, row, step, count, t);
  if (p.tokens - t == 1) group<1>(p, row, step, count, t);
}

void rows(const Product& p, int64_t first, int64_t last, float*) {
  const int64_t step = (last - first) / kRows, rest = first + step * kRows;
  for (int64_t i = 0; i < step; ++i) tokens(p, first + i, step, kRows);
  if (rest < last) tokens(p, rest, 1, last - rest);
}

struct Format {
  // Codes [from, to) of a panel's rows, as pairs of halfwords with one row a lane.
  static void pack(const Product& p, int64_t first, int64_t from, int64_t to, uint8_t* panel) {
    const int64_t stride = p.blocks * p.block;
    for (int64_t n = 0; n < kPanel; n += kGroup) {
      const uint8_t* w[kGroup];
      for (int r = 0; r < kGroup; ++r) {
        const int64_t row = first + n + r;
        w[r] = p.codes + (row < p.columns ? row : p.columns - 1) * stride;
      }
      uint8_t* out = panel + n * 4;
      for (int64_t k = from; k < to; k += kNarrow) {
        Ints low[kGroup], high[kGroup];
        for (int r = 0; r < kGroup; ++r) {
          const Words v = read<Words>(w[r] + k);
          low[r] = (Ints)(v & 255);
          high[r] = (Ints)(v >> 8);
        }
        transpose_group(low);
        transpose_group(high);
        for (int i = 0; i < kGroup; ++i) {
          write(out + i * kPanel * 4, low[i]);
          write(out + (kGroup + i) * kPanel * 4, high[i]);
        }
        out += 2 * kGroup * kPanel * 4;
      }
    }
  }

  static float scale(const Product& p, int64_t row, int64_t b) {
    return static_cast<const float*>(p.scales)[row * p.blocks + b];
  }

  XEXPORT_INLINE void sums(const uint8_t* panel, int64_t block, const uint8_t* const* x, const int32_t* const* offsets,
                           int64_t b, IntVec (*sums)[kWidth]) {
#pragma GCC unroll 12
    for (int t = 0; t < kTall; ++t) {
      for (int v = 0; v < kWidth; ++v) sums[t][v] = IntVec{} - offsets[t][b];
    }
    for (int64_t k = 0; k < block * 2; k += 4 * kUnits) {
#pragma GCC unroll 2
      for (int u = 0; u < kUnits; ++u) {
        WideShorts w[kWidth];
        for (int v = 0; v < kWidth; ++v) w[v] = read<WideShorts>(panel + (k + 4 * u) * kPanel + v * kBytes);
#pragma GCC unroll 12
        for (int t = 0; t < kTall; ++t) {
          const auto a = (WideShorts)(read<int32_t>(x[t] + k + 4 * u) - IntVec{});
          for (int v = 0; v < kWidth; ++v) add_madd<kBytes>(sums[t][v], w[v], a);
        }
      }
    }
  }
};

}  // namespace

const ProductLoops linear_int8_loops = {kRows, kPanels * kPanel, kMany, row_bytes, scratch_size, quantize, rows,
                                        quantized_tile<Format>};

}  // namespace xexport::XEXPORT_ISA
