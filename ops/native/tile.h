// Products of many tokens with quantized weights: panels of weights against tiles of tokens.
//
// A panel is kPanel columns of the result by kDeep numbers, unpacked once; a tile is kTall tokens of them, its sums
// in registers for one block of weights, then scaled and added to y. A tile meets kPanels panels in turn: it stays
// in the first cache, and the panels in the second.
//
// A format has
//   static void pack(const Product&, int64_t first, int64_t from, int64_t to, uint8_t* panel);
//   static float scale(const Product&, int64_t row, int64_t block);
//   static void sums(const uint8_t* panel, int64_t block, const uint8_t* const* x, const int32_t* const* offsets,
//                    int64_t b, IntVec (*sums)[kWidth]);
//     the products of block b less offsets[t][b]; a panel and x[t] are 4-byte units in the same order
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
constexpr int64_t kDeep = 512;
constexpr int64_t kPanels = 4;
constexpr int64_t kShallowest = 32;  // numbers of a block

// kTall tokens: where their activations are, the last one standing for those that don't exist.
struct Tile {
  const uint8_t* codes[kTall];
  const float* scales[kTall];
  const int32_t* offsets[kTall];

  static Tile of(const Product& p, int64_t token, int64_t count) {
    Tile tile;
    for (int t = 0; t < kTall; ++t) {
      const int64_t line = token + (t < count ? t : count - 1);
      tile.codes[t] = p.quantized.codes + line * p.quantized.row_bytes;
      tile.scales[t] = p.quantized.scales + line * p.blocks;
      tile.offsets[t] = p.quantized.offsets + line * p.blocks;
    }
    return tile;
  }
};

// kTall by kPanel numbers of y, or a copy of what exists of them.
class Corner {
 public:
  Corner(const Product& p, int64_t first, int64_t token, int64_t count)
      : y_(p.y + token * p.columns + first), stride_(p.columns), count_(count) {
    width_ = p.columns - first < kPanel ? p.columns - first : kPanel;
    copied_ = width_ < kPanel || count < kTall;
    if (copied_) std::memset(copy_, 0, sizeof(copy_));
  }
  void read() {
    for (int64_t i = 0; copied_ && i < count_; ++i) std::memcpy(copy_ + i * kPanel, y_ + i * stride_, bytes());
  }
  void write() const {
    for (int64_t i = 0; copied_ && i < count_; ++i) std::memcpy(y_ + i * stride_, copy_ + i * kPanel, bytes());
  }
  float* y() { return copied_ ? copy_ : y_; }
  int64_t stride() const { return copied_ ? kPanel : stride_; }

 private:
  size_t bytes() const { return static_cast<size_t>(width_) * sizeof(float); }

  float* y_;
  int64_t stride_, count_, width_;
  bool copied_;
  alignas(64) float copy_[kTall * kPanel];
};

// Block b of a panel and a tile, `at` bytes into its activations; `First` stores the products, else they are added to y.
template <class Format, bool First>
XEXPORT_INLINE void block_tile(const Product& p, const uint8_t* panel, const Tile& tile, int64_t b, int64_t at,
                               const Vec* scales, float* y, int64_t stride) {
  const uint8_t* x[kTall];
  IntVec sums[kTall][kWidth];
#pragma GCC unroll 12
  for (int t = 0; t < kTall; ++t) x[t] = tile.codes[t] + at;
  Format::sums(panel, p.block, x, tile.offsets, b, sums);
#pragma GCC unroll 12
  for (int t = 0; t < kTall; ++t) {
    const Vec scale = all(tile.scales[t][b]);
    for (int v = 0; v < kWidth; ++v) {
      float* to = y + t * stride + v * kLanes;
      const Vec before = First ? Vec{} : load(to);
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
  auto* panels = reinterpret_cast<uint8_t*>(scratch);
  const int64_t depth = p.blocks * p.block, block_bytes = p.quantized.row_bytes / p.blocks;
  const int64_t panel_bytes = kDeep / p.block * block_bytes * kPanel;
  const int64_t last = first + kPanels * kPanel < p.columns ? first + kPanels * kPanel : p.columns;
  Vec scales[kPanels][kDeep / kShallowest][kWidth];
  for (int64_t from = 0; from < depth; from += kDeep) {
    const int64_t to = from + kDeep < depth ? from + kDeep : depth, from_block = from / p.block;
    for (int64_t n = first, i = 0; n < last; n += kPanel, ++i) {
      Format::pack(p, n, from, to, panels + i * panel_bytes);
      panel_scales<Format>(p, n, from_block, to / p.block, scales[i]);
    }
    for (int64_t t = begin; t < end; t += kTall) {
      const int64_t count = end - t < kTall ? end - t : kTall;
      const Tile tile = Tile::of(p, t, count);
      for (int64_t n = first, i = 0; n < last; n += kPanel, ++i) {
        Corner corner(p, n, t, count);
        if (from > 0) corner.read();
        const uint8_t* part = panels + i * panel_bytes;
        for (int64_t b = from_block; b < to / p.block; ++b, part += block_bytes * kPanel) {
          const Vec* factors = scales[i][b - from_block];
          if (b == 0) {
            block_tile<Format, true>(p, part, tile, b, b * block_bytes, factors, corner.y(), corner.stride());
          } else {
            block_tile<Format, false>(p, part, tile, b, b * block_bytes, factors, corner.y(), corner.stride());
          }
        }
        corner.write();
      }
    }
  }
}

}  // namespace xexport::XEXPORT_ISA
