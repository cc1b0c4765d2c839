// Products of many tokens with quantized weights: panels of weights against tiles of tokens.
//
// A panel is kPanel columns of the result by kDeep numbers, unpacked once so that it stays in the first cache;
// a tile is kTall tokens of them, its sums in registers for one block of weights, then scaled and added to y.
//
// A format has
//   static void pack(const Product&, int64_t first, int64_t from, int64_t to, uint8_t* panel);
//   static float scale(const Product&, int64_t row, int64_t block);
//   static void sums(const uint8_t* panel, int64_t block, const uint8_t* const* x, IntVec (*sums)[kWidth]);
//     adds the products of one block; a panel and x[t] are 4-byte units in the same order
#pragma once

#include "dot.h"
#include "products.h"

namespace xexport::XEXPORT_ISA {

constexpr int kWidth = 2;  // vectors of a tile's columns
constexpr int kPanel = kWidth * kLanes;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTall = 12;  // tokens of a tile: kWidth * kTall accumulators
#else
constexpr int kTall = 6;
#endif
constexpr int64_t kDeep = 256;
constexpr int64_t kShallowest = 32;  // numbers of a block

// One block of a panel and kTall tokens, `count` of which exist.
template <class Format>
XEXPORT_INLINE void block_tile(const Product& p, const uint8_t* panel, int64_t b, const Vec* scales, int64_t token,
                               int64_t count, float* y, int64_t stride) {
  const uint8_t* x[kTall];
  int64_t at[kTall];
  IntVec sums[kTall][kWidth];
#pragma GCC unroll 12
  for (int t = 0; t < kTall; ++t) {
    const int64_t line = token + (t < count ? t : count - 1);
    x[t] = p.quantized.codes + line * p.quantized.row_bytes + b * (p.quantized.row_bytes / p.blocks);
    at[t] = line * p.blocks + b;
  }
  Format::sums(panel, p.block, x, p.quantized.offsets, at, sums);
#pragma GCC unroll 12
  for (int t = 0; t < kTall; ++t) {
    if (t >= count) break;
    const Vec scale = all(p.quantized.scales[at[t]]);
    for (int v = 0; v < kWidth; ++v) {
      float* to = y + t * stride + v * kLanes;
      const Vec before = b == 0 ? Vec{} : load(to);
      store(to, fused<Vec>(__builtin_convertvector(sums[t][v], Vec), scales[v] * scale, before));
    }
  }
}

// The scales of a panel's blocks, one column a lane.
template <class Format>
void panel_scales(const Product& p, int64_t first, int64_t from_block, int64_t to_block, Vec (*scales)[kWidth]) {
  for (int64_t b = from_block; b < to_block; ++b) {
    alignas(64) float lanes[kPanel];
    for (int64_t n = 0; n < kPanel; ++n) {
      lanes[n] = Format::scale(p, first + n < p.columns ? first + n : p.columns - 1, b);
    }
    for (int v = 0; v < kWidth; ++v) scales[b - from_block][v] = load(lanes + v * kLanes);
  }
}

template <class Format>
void quantized_tile(const Product& p, int64_t first, int64_t begin, int64_t end, float* scratch) {
  auto* panel = reinterpret_cast<uint8_t*>(scratch);
  const int64_t depth = p.blocks * p.block, width = p.columns - first < kPanel ? p.columns - first : kPanel;
  const bool whole = width == kPanel;
  const auto bytes = static_cast<size_t>(width) * sizeof(float);
  alignas(64) float edge[kTall * kPanel];
  Vec scales[kDeep / kShallowest][kWidth];
  for (int64_t from = 0; from < depth; from += kDeep) {
    const int64_t to = from + kDeep < depth ? from + kDeep : depth, from_block = from / p.block;
    Format::pack(p, first, from, to, panel);
    panel_scales<Format>(p, first, from_block, to / p.block, scales);
    for (int64_t t = begin; t < end; t += kTall) {
      const int64_t count = end - t < kTall ? end - t : kTall;
      float* y = p.y + t * p.columns + first;
      for (int64_t i = 0; !whole && from > 0 && i < count; ++i) {
        std::memcpy(edge + i * kPanel, y + i * p.columns, bytes);
      }
      for (int64_t b = from_block; b < to / p.block; ++b) {
        const uint8_t* part = panel + (b - from_block) * (p.quantized.row_bytes / p.blocks) * kPanel;
        block_tile<Format>(p, part, b, scales[b - from_block], t, count, whole ? y : edge, whole ? p.columns : kPanel);
      }
      for (int64_t i = 0; !whole && i < count; ++i) std::memcpy(y + i * p.columns, edge + i * kPanel, bytes);
    }
  }
}

}  // namespace xexport::XEXPORT_ISA
