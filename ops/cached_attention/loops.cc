// Softmax attention of some rows over the keys so far, a block of keys at a time.
//
// Both products are tiles of kTall rows by two vectors, accumulated in registers: scores with the block of keys
// turned so that keys lie in the lanes, outputs with values as they are. The largest score so far is kept, and
// what was summed before is scaled down when it grows (Milakov and Gimelshein, arXiv 1805.02867).
#include "loops.h"

#include "../native/exp.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int64_t kWidth = 2 * kLanes;  // of a tile
constexpr int64_t kKeys = 64;           // of a block: whole tiles of every instruction set
constexpr int kTall = 4;

int64_t padded(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

// to[r, 0 .. kWidth) (+)= sum_n a[r, n] b[n, 0 .. kWidth)
template <int Rows>
XEXPORT_INLINE void tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* to,
                         int64_t to_stride, bool add) {
  Vec low[Rows], high[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    low[r] = add ? load(to + r * to_stride) : Vec{};
    high[r] = add ? load(to + r * to_stride + kLanes) : Vec{};
  }
  for (int64_t n = 0; n < depth; ++n) {
    const Vec x = load(b + n * b_stride), y = load(b + n * b_stride + kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Vec c = all(a[r * a_stride + n]);
      low[r] += c * x;
      high[r] += c * y;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    store(to + r * to_stride, low[r]);
    store(to + r * to_stride + kLanes, high[r]);
  }
}

// to [rows, columns] (+)= a [rows, depth] b [depth, columns], columns being whole tiles.
void product(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows, int64_t depth,
             int64_t columns, float* to, int64_t to_stride, bool add) {
  int64_t r = 0;
  for (; r + kTall <= rows; r += kTall) {
    for (int64_t c = 0; c < columns; c += kWidth) {
      tile<kTall>(a + r * a_stride, a_stride, b + c, b_stride, depth, to + r * to_stride + c, to_stride, add);
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kWidth) {
      tile<1>(a + r * a_stride, a_stride, b + c, b_stride, depth, to + r * to_stride + c, to_stride, add);
    }
  }
}

// The scores [kKeys] of a row become shares, those from `seen` on zero; `out` is scaled to the new largest score.
XEXPORT_INLINE void share(float* scores, int64_t seen, float* out, int64_t columns, float& largest, float& sum) {
  for (int64_t i = seen < 0 ? 0 : seen; i < kKeys; ++i) scores[i] = -__builtin_inff();
  if (seen <= 0) {
    std::memset(scores, 0, sizeof(float) * kKeys);
    return;
  }
  Vec top = load(scores);
  for (int64_t i = kLanes; i < kKeys; i += kLanes) {
    const Vec s = load(scores + i);
    top = s > top ? s : top;
  }
  float most = largest;
  for (int i = 0; i < kLanes; ++i) most = top[i] > most ? top[i] : most;
  if (most > largest) {
    const float old = sum > 0 ? exp2_any(all((largest - most) * kLog2E))[0] : 0.0f;
    for (int64_t i = 0; i < columns; i += kLanes) store(out + i, load(out + i) * all(old));
    sum *= old;
    largest = most;
  }
  Vec total = {};
  for (int64_t i = 0; i < kKeys; i += kLanes) {
    const Vec p = exp2_any((load(scores + i) - all(most)) * all(kLog2E));
    store(scores + i, p);
    total += p;
  }
  sum += xexport::XEXPORT_ISA::sum(total);
}

int64_t scratch_size(int64_t size, int64_t width) {
  return kAttentionRows * (size + kKeys + padded(width)) + kKeys * (size + padded(width));
}

void run(const AttentionHead& x, int64_t first, int64_t last, float* scratch) {
  const int64_t rows = last - first, columns = padded(x.width);
  float* q = scratch;                        // [rows, size]
  float* scores = q + kAttentionRows * x.size;  // [rows, kKeys]
  float* out = scores + kAttentionRows * kKeys;  // [rows, columns]
  float* turned = out + kAttentionRows * columns;  // [size, kKeys]
  float* values = turned + kKeys * x.size;         // [kKeys, columns], if the cache's are no whole tiles
  float largest[kAttentionRows], sum[kAttentionRows];
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = x.q + (first + r) / x.group * x.q_stride + (first + r) % x.group * x.size;
    for (int64_t i = 0; i < x.size; ++i) q[r * x.size + i] = from[i] * x.scale;
    largest[r] = -__builtin_inff();
    sum[r] = 0;
  }
  std::memset(out, 0, sizeof(float) * static_cast<size_t>(rows * columns));
  const int64_t end = x.begin + (last - 1) / x.group + 1;
  for (int64_t key = 0; key < end; key += kKeys) {
    const int64_t count = end - key < kKeys ? end - key : kKeys;
    if (count < kKeys) std::memset(turned, 0, sizeof(float) * static_cast<size_t>(kKeys * x.size));
    transpose(x.keys + key * x.size, x.size, count, x.size, turned, kKeys);
    product(q, x.size, turned, kKeys, rows, x.size, kKeys, scores, kKeys, false);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t seen = x.begin + (first + r) / x.group + 1 - key;
      share(scores + r * kKeys, seen < kKeys ? seen : kKeys, out + r * columns, columns, largest[r], sum[r]);
    }
    const float* v = x.values + key * x.width;
    if (columns != x.width) {
      for (int64_t i = 0; i < count; ++i) {
        std::memset(values + i * columns, 0, sizeof(float) * static_cast<size_t>(columns));
        std::memcpy(values + i * columns, v + i * x.width, sizeof(float) * static_cast<size_t>(x.width));
      }
      v = values;
    }
    product(scores, kKeys, v, columns, rows, count, columns, out, columns, true);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* to = x.out + (first + r) / x.group * x.out_stride + (first + r) % x.group * x.width;
    const float share_of_one = 1 / sum[r];
    for (int64_t i = 0; i < x.width; ++i) to[i] = out[r * columns + i] * share_of_one;
  }
}

}  // namespace

const AttentionLoops attention_loops = {run, scratch_size};

}  // namespace xexport::XEXPORT_ISA
