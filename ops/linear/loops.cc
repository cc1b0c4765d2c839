// Products with float weights [columns, depth] as they lie in the file, in 32 or 16 bits; all sums in 32 bits.
#include "loops.h"

#include "../native/half.h"
#include "../native/tile.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int64_t kMany = 12;    // tokens from which panels earn back their packing
constexpr int64_t kAhead = 512;  // bytes of a row that are prefetched

int64_t row_bytes(int64_t, int64_t) { return 0; }
int64_t scratch_size(const Product&) { return kPanels * kPanel * kDeep; }

struct F32 {
  typedef float Number;
  XEXPORT_INLINE Floats read(const float* p) { return xexport::XEXPORT_ISA::read<Floats>(p); }
  XEXPORT_INLINE float one(const float* p) { return *p; }
};
struct F16 {
  typedef uint16_t Number;
  XEXPORT_INLINE Floats read(const uint16_t* p) { return read_halves(p); }
  XEXPORT_INLINE float one(const uint16_t* p) { return half_to_float(*p); }
};

// Rows row, row + step ..., of which `count` exist, with Tokens tokens: step makes each lane's rows follow one
// another in memory. Every sum has two halves, so that the next product needn't wait for the last one.
template <class Weight, int Tokens>
XEXPORT_INLINE void group(const Product& p, int64_t row, int64_t step, int64_t count, int64_t token) {
  constexpr int kAtOnce = Tokens == 1 ? kRows : 2;  // rows whose sums stay in registers
  const typename Weight::Number* w[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t line = row + (r < count ? r : count - 1) * step;
    w[r] = reinterpret_cast<const typename Weight::Number*>(p.codes) + line * p.depth;
  }
  const float* x = p.x + token * p.depth;
  const int64_t pairs = p.depth / (2 * kGroup) * (2 * kGroup);
  Floats parts[Tokens][kRows];
#pragma GCC unroll 2
  for (int r0 = 0; r0 < kRows; r0 += kAtOnce) {
    Floats sums[Tokens][kAtOnce][2] = {};
#pragma GCC unroll 1
    for (int64_t k = 0; k < pairs; k += 2 * kGroup) {
#pragma GCC unroll 4
      for (int r = 0; r < kAtOnce; ++r) {
        if (Tokens == 1) prefetch(reinterpret_cast<const uint8_t*>(w[r0 + r] + k) + kAhead);
        for (int h = 0; h < 2; ++h) {
          const Floats v = Weight::read(w[r0 + r] + k + h * kGroup);
          for (int t = 0; t < Tokens; ++t) {
            sums[t][r][h] = fused<Floats>(v, read<Floats>(x + t * p.depth + k + h * kGroup), sums[t][r][h]);
          }
        }
      }
    }
    for (int t = 0; t < Tokens; ++t) {
      for (int r = 0; r < kAtOnce; ++r) parts[t][r0 + r] = sums[t][r][0] + sums[t][r][1];
    }
  }
  for (int t = 0; t < Tokens; ++t) {
    RowFloats result = row_sums(parts[t]);
    for (int64_t k = pairs; k < p.depth; ++k) {
      for (int r = 0; r < kRows; ++r) result[r] += Weight::one(w[r] + k) * x[t * p.depth + k];
    }
    float* y = p.y + (token + t) * p.columns + row;
    for (int64_t r = 0; r < count; ++r) y[r * step] = result[r];
  }
}

template <class Weight>
void tokens(const Product& p, int64_t row, int64_t step, int64_t count) {
  int64_t t = 0;
  for (; t + 3 <= p.tokens; t += 3) group<Weight, 3>(p, row, step, count, t);
  if (p.tokens - t == 2) group<Weight, 2>(p, row, step, count, t);
  if (p.tokens - t == 1) group<Weight, 1>(p, row, step, count, t);
}

template <class Weight>
void rows(const Product& p, int64_t first, int64_t last, float*) {
  const int64_t step = (last - first) / kRows, rest = first + step * kRows;
  for (int64_t i = 0; i < step; ++i) tokens<Weight>(p, first + i, step, kRows);
  if (rest < last) tokens<Weight>(p, rest, 1, last - rest);
}

// Numbers [from, to) of a panel's rows, one row a lane.
template <class Weight>
void pack(const Product& p, int64_t first, int64_t from, int64_t to, float* panel) {
  for (int64_t n = 0; n < kPanel; n += kGroup) {
    const typename Weight::Number* w[kGroup];
    for (int r = 0; r < kGroup; ++r) {
      const int64_t row = first + n + r;
      w[r] = reinterpret_cast<const typename Weight::Number*>(p.codes) + (row < p.columns ? row : p.columns - 1) * p.depth;
    }
    float* out = panel + n;
    int64_t k = from;
    for (; k + kGroup <= to; k += kGroup, out += kGroup * kPanel) {
      Ints v[kGroup];
      for (int r = 0; r < kGroup; ++r) v[r] = (Ints)Weight::read(w[r] + k);
      transpose_group(v);
      for (int i = 0; i < kGroup; ++i) write(out + i * kPanel, v[i]);
    }
    for (; k < to; ++k, out += kPanel) {
      for (int r = 0; r < kGroup; ++r) out[r] = Weight::one(w[r] + k);
    }
  }
}

// kTall tokens and a panel of `deep` numbers, stored in y or added to it.
XEXPORT_INLINE void float_tile(const float* panel, const float* const* x, int64_t deep, float* y, int64_t stride,
                               bool is_first) {
  Vec sums[kTall][kWidth] = {};
  for (int64_t k = 0; k < deep; ++k) {
    Vec w[kWidth];
    for (int v = 0; v < kWidth; ++v) w[v] = load(panel + k * kPanel + v * kLanes);
#pragma GCC unroll 12
    for (int t = 0; t < kTall; ++t) {
      const Vec a = all(x[t][k]);
      for (int v = 0; v < kWidth; ++v) sums[t][v] += w[v] * a;
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < kTall; ++t) {
    for (int v = 0; v < kWidth; ++v) {
      float* to = y + t * stride + v * kLanes;
      store(to, is_first ? sums[t][v] : load(to) + sums[t][v]);
    }
  }
}

template <class Weight>
void tile(const Product& p, int64_t first, int64_t begin, int64_t end, float* panels) {
  const int64_t last = first + kPanels * kPanel < p.columns ? first + kPanels * kPanel : p.columns;
  for (int64_t from = 0; from < p.depth; from += kDeep) {
    const int64_t to = from + kDeep < p.depth ? from + kDeep : p.depth;
    for (int64_t n = first; n < last; n += kPanel) pack<Weight>(p, n, from, to, panels + (n - first) * kDeep);
    for (int64_t t = begin; t < end; t += kTall) {
      const int64_t count = end - t < kTall ? end - t : kTall;
      const float* x[kTall];
      for (int i = 0; i < kTall; ++i) x[i] = p.x + (t + (i < count ? i : count - 1)) * p.depth + from;
      for (int64_t n = first; n < last; n += kPanel) {
        Corner corner(p, n, t, count);
        if (from > 0) corner.read();
        float_tile(panels + (n - first) * kDeep, x, to - from, corner.y(), corner.stride(), from == 0);
        corner.write();
      }
    }
  }
}

}  // namespace

const ProductLoops linear_f32_loops = {kRows, kPanels * kPanel, kMany, row_bytes, scratch_size, nullptr, rows<F32>, tile<F32>};
const ProductLoops linear_f16_loops = {kRows, kPanels * kPanel, kMany, row_bytes, scratch_size, nullptr, rows<F16>, tile<F16>};

}  // namespace xexport::XEXPORT_ISA
