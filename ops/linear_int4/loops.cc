// Products with 4-bit weights, in blocks of 32 with a scale each, and activations rounded to 8 bits.
//
//   y[n] = sum over blocks of  scale_w[n,b] * scale_x[b] * ( sum_k w[n,k] x[k]  -  8 sum_k x[k] )
//
// w are the unsigned codes as they lie in the file: a block is 16 bytes, the even codes in the low and the odd
// ones in the high half of each. So the activations of a block lie as its 16 even, then its 16 odd elements.
// Sums of products of bytes are kept in 16 bits while they are exact: 8 * 15 * 127 * 2 < 2^15.
#include "loops.h"

#include "../native/half.h"
#include "../native/round.h"
#include "../native/tile.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int64_t kMany = 12;    // tokens from which panels earn back their packing
constexpr int64_t kAhead = 512;        // bytes of a row that are prefetched
constexpr int64_t kScalesAhead = 48;  // scales
constexpr int64_t kBlock = 32;
constexpr int64_t kBlockBytes = kBlock / 2;
constexpr int kBlocksAtOnce = kNarrow / 16;

typedef Of<16>::U8 Bytes16;
typedef Of<kNarrow>::S8 Signed;
typedef Of<kBytes>::U8 WideBytes;
typedef Of<kBytes>::S8 WideSigned;
typedef Of<kBytes>::S16 WideShorts;

int64_t row_bytes(int64_t blocks, int64_t block) { return blocks * block; }
int64_t scratch_size(const Product& p) {
  const int64_t panel = kPanels * kPanel * kDeep / 4, scales = (p.blocks + kGroup) * kGroup;
  return (panel > scales ? panel : scales) + 64;
}

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
  constexpr int kParts = kBlock / kGroup;  // vectors of a block
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t at = b * kBlock, left = depth - at < kBlock ? depth - at : kBlock;
    const Rounding rounding = rounding_of(x + at, left, 127.0f);
    scales[b] = rounding.scale;
    Ints v[kParts], halves[kParts], total = {};
    for (int i = 0; i < kParts; ++i) total += v[i] = rounded(rounding, x + at, i * kGroup, left);
    for (int i = 0; i < kParts; i += 2) split(v[i], v[i + 1], halves[i / 2], halves[(kParts + i) / 2]);
    for (int i = 0; i < kParts; i += 4) write(codes + at + i * kGroup, low_bytes(halves + i));
    offsets[b] = 8 * sum_of(total);
  }
}

// kBlocksAtOnce blocks of codes, or the last one alone.
template <bool All>
XEXPORT_INLINE Bytes read_codes(const uint8_t* p) {
  if constexpr (All || kBlocksAtOnce == 1) {
    return read<Bytes>(p);
  } else {
    Bytes v = {};
    std::memcpy(&v, p, 16);
    return v;
  }
}

// The even (from 0) or odd (from 16) activations of kBlocksAtOnce blocks.
template <bool All>
XEXPORT_INLINE Signed read_numbers(const uint8_t* p) {
#if defined(__AVX2__)
  const __m128i low = read<__m128i>(p);
  return (Signed)_mm256_inserti128_si256(_mm256_castsi128_si256(low), All ? read<__m128i>(p + kBlock) : __m128i{}, 1);
#else
  return read<Signed>(p);
#endif
}

// Scales [blocks, kRows] of kRows rows, one row a lane.
XEXPORT_INLINE void row_scales(const Product& p, const int64_t* lines, float* to) {
  const uint16_t* from[kRows];
  for (int r = 0; r < kRows; ++r) {
    from[r] = static_cast<const uint16_t*>(p.scales) + lines[r] * p.blocks;
    prefetch(from[r] + kScalesAhead);
  }
  int64_t b = 0;
  for (; b + kGroup <= p.blocks; b += kGroup) {
    Ints v[kRows];
    for (int r = 0; r < kRows; ++r) v[r] = (Ints)read_halves(from[r] + b);
    transpose_fours(v);
    for (int i = 0; i < kRows; ++i) {
#if defined(__AVX2__)
      write(to + (b + i) * kRows, __builtin_shufflevector(v[i], v[i], 0, 1, 2, 3));
      write(to + (b + kRows + i) * kRows, __builtin_shufflevector(v[i], v[i], 4, 5, 6, 7));
#else
      write(to + (b + i) * kRows, v[i]);
#endif
    }
  }
  for (; b < p.blocks; ++b) {
    for (int r = 0; r < kRows; ++r) to[b * kRows + r] = half_to_float(from[r][b]);
  }
}

// Sums of products of kRows rows with kBlocksAtOnce blocks of one token: sums[i] is of block i, a row a lane.
template <bool All, bool Ahead>
XEXPORT_INLINE void block_sums(const uint8_t* const* w, int64_t at, const uint8_t* x, RowInts* sums) {
  const Signed even = read_numbers<All>(x), odd = read_numbers<All>(x + 16);
  Shorts parts[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    if (Ahead) prefetch(w[r] + at + kAhead);
    const Bytes v = in_register(read_codes<All>(w[r] + at));
    const Bytes low = v & 15, high = (Bytes)((Words)v >> 4) & 15;
    parts[r] = in_register(madd_nibbles<kNarrow>(low, even));
    parts[r] = in_register(parts[r] + madd_nibbles<kNarrow>(high, odd));
  }
  const Ints both = madd<kNarrow>(four_sums(parts[0], parts[1], parts[2], parts[3]), Shorts{} + 1);
#if defined(__AVX2__)
  sums[0] = __builtin_shufflevector(both, both, 0, 1, 2, 3);
  sums[1] = __builtin_shufflevector(both, both, 4, 5, 6, 7);
#else
  sums[0] = both;
#endif
}

// As in linear_int8: rows row, row + step ... with one token.
template <bool Ahead>
XEXPORT_INLINE void group(const Product& p, const int64_t* lines, int64_t count, int64_t token, const float* scales) {
  const uint8_t* w[kRows];
  for (int r = 0; r < kRows; ++r) w[r] = p.codes + lines[r] * p.blocks * kBlockBytes;
  const uint8_t* x = p.quantized.codes + token * p.quantized.row_bytes;
  const float* x_scales = p.quantized.scales + token * p.blocks;
  const int32_t* offsets = p.quantized.offsets + token * p.blocks;
  RowFloats result = {};
  const auto add = [&](int64_t b, RowInts sums) __attribute__((always_inline)) {
    const RowFloats scale = read<RowFloats>(scales + b * kRows) * x_scales[b];
    result = fused<RowFloats>(__builtin_convertvector(sums - (offsets[b] - RowInts{}), RowFloats), scale, result);
  };
  RowInts sums[kBlocksAtOnce];
  int64_t b = 0;
#pragma GCC unroll 1
  for (; b + kBlocksAtOnce <= p.blocks; b += kBlocksAtOnce) {
    block_sums<true, Ahead>(w, b * kBlockBytes, x + b * kBlock, sums);
    for (int i = 0; i < kBlocksAtOnce; ++i) add(b + i, sums[i]);
  }
  if (b < p.blocks) {
    block_sums<false, false>(w, b * kBlockBytes, x + b * kBlock, sums);
    add(b, sums[0]);
  }
  for (int64_t r = 0; r < count; ++r) p.y[token * p.columns + lines[r]] = result[r];
}

// Rows row, row + step ..., of which `count` exist, with every token.
void tokens(const Product& p, int64_t row, int64_t step, int64_t count, float* scratch) {
  int64_t lines[kRows];
  for (int r = 0; r < kRows; ++r) lines[r] = row + (r < count ? r : count - 1) * step;
  row_scales(p, lines, scratch);
  group<true>(p, lines, count, 0, scratch);
  for (int64_t t = 1; t < p.tokens; ++t) group<false>(p, lines, count, t, scratch);
}

void rows(const Product& p, int64_t first, int64_t last, float* scratch) {
  const int64_t step = (last - first) / kRows, rest = first + step * kRows;
  for (int64_t i = 0; i < step; ++i) tokens(p, first + i, step, kRows, scratch);
  if (rest < last) tokens(p, rest, 1, last - rest, scratch);
}

struct Format {
  // Codes [from, to) of a panel's rows, as groups of four bytes with one row a lane.
  static void pack(const Product& p, int64_t first, int64_t from, int64_t to, uint8_t* panel) {
    const int64_t stride = p.blocks * kBlockBytes;
    for (int64_t n = 0; n < kPanel; n += kGroup) {
      const uint8_t* w[kGroup];
      for (int r = 0; r < kGroup; ++r) {
        const int64_t row = first + n + r;
        w[r] = p.codes + (row < p.columns ? row : p.columns - 1) * stride;
      }
      uint8_t* out = panel + n * 4;
      for (int64_t b = from / kBlock; b < to / kBlock; b += kBlocksAtOnce) {
        const bool all = b + kBlocksAtOnce <= p.blocks;
        Ints low[kGroup], high[kGroup];
        for (int r = 0; r < kGroup; ++r) {
          const uint8_t* at = w[r] + b * kBlockBytes;
          const Bytes v = all ? read_codes<true>(at) : read_codes<false>(at);
          low[r] = (Ints)(v & 15);
          high[r] = (Ints)((Bytes)((Words)v >> 4) & 15);
        }
        transpose_group(low);
        transpose_group(high);
        for (int i = 0; i < (all ? kBlocksAtOnce : 1); ++i) {
          for (int unit = 0; unit < 4; ++unit) {
            write(out + unit * kPanel * 4, low[4 * i + unit]);
            write(out + (4 + unit) * kPanel * 4, high[4 * i + unit]);
          }
          out += 8 * kPanel * 4;
        }
      }
    }
  }

  static float scale(const Product& p, int64_t row, int64_t b) {
    return half_to_float(static_cast<const uint16_t*>(p.scales)[row * p.blocks + b]);
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

const ProductLoops linear_int4_loops = {kRows,        kPanels * kPanel, kMany, row_bytes,
                                        scratch_size, quantize, rows,  quantized_tile<Format>};

}  // namespace xexport::XEXPORT_ISA
