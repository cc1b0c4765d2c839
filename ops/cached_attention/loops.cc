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

// The scores [kKeys] of a row become shares, those outside first .. last - 1 zero; `out` is scaled to the new
// largest score.
XEXPORT_INLINE void share(float* scores, int64_t first, int64_t last, float* out, int64_t columns, float& largest,
                          float& sum) {
  first = first > 0 ? first : 0;
  last = last < kKeys ? last : kKeys;
  if (first >= last) {
    std::memset(scores, 0, sizeof(float) * kKeys);
    return;
  }
  for (int64_t i = 0; i < first; ++i) scores[i] = -__builtin_inff();
  for (int64_t i = last; i < kKeys; ++i) scores[i] = -__builtin_inff();
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

// The parts of the scratch.
struct Parts {
  float *q, *scores, *out, *turned, *values;
  explicit Parts(const AttentionRows& x)
      : q(x.scratch),                                    // [rows, size]
        scores(q + kAttentionRows * x.size),             // [rows, kKeys]
        out(scores + kAttentionRows * kKeys),            // [rows, padded(width)]
        turned(out + kAttentionRows * padded(x.width)),  // [size, kKeys]
        values(turned + kKeys * x.size) {}               // [kKeys, padded(width)], if the run's are no whole tiles
};

void query(AttentionRows& x) {
  float* q = Parts(x).q;
  for (int64_t r = 0; r < x.count; ++r) {
    for (int64_t i = 0; i < x.size; ++i) q[r * x.size + i] = x.q[r][i] * x.scale;
  }
}

void begin(AttentionRows& x) {
  query(x);
  std::memset(Parts(x).out, 0, sizeof(float) * static_cast<size_t>(x.count * padded(x.width)));
  for (int64_t r = 0; r < x.count; ++r) {
    x.largest[r] = -__builtin_inff();
    x.sum[r] = 0;
  }
}

void over(AttentionRows& x, const KeyRun& run) {
  const Parts parts(x);
  const int64_t columns = padded(x.width);
  int64_t first = run.count, last = 0, top = x.count, bottom = 0;  // keys, and rows, that have to do with it
  for (int64_t r = 0; r < x.count; ++r) {
    if (x.from[r] >= x.to[r]) continue;
    first = x.from[r] < first ? x.from[r] : first;
    last = x.to[r] > last ? x.to[r] : last;
    top = r < top ? r : top;
    bottom = r + 1;
  }
  for (int64_t key = first < 0 ? 0 : first; key < last; key += kKeys) {
    const int64_t count = last - key < kKeys ? last - key : kKeys;
    if (count < kKeys) std::memset(parts.turned, 0, sizeof(float) * static_cast<size_t>(kKeys * x.size));
    transpose(run.keys + key * run.key_stride, run.key_stride, count, x.size, parts.turned, kKeys);
    product(parts.q + top * x.size, x.size, parts.turned, kKeys, bottom - top, x.size, kKeys,
            parts.scores + top * kKeys, kKeys, false);
    for (int64_t r = top; r < bottom; ++r) {
      share(parts.scores + r * kKeys, x.from[r] - key, x.to[r] - key, parts.out + r * columns, columns, x.largest[r],
            x.sum[r]);
    }
    const float* v = run.values + key * run.value_stride;
    int64_t stride = run.value_stride;
    if (columns != x.width) {
      for (int64_t i = 0; i < count; ++i) {
        std::memset(parts.values + i * columns, 0, sizeof(float) * static_cast<size_t>(columns));
        std::memcpy(parts.values + i * columns, v + i * stride, sizeof(float) * static_cast<size_t>(x.width));
      }
      v = parts.values;
      stride = columns;
    }
    product(parts.scores + top * kKeys, kKeys, v, stride, bottom - top, count, columns, parts.out + top * columns,
            columns, true);
  }
}

void finish(AttentionRows& x) {
  const float* out = Parts(x).out;
  for (int64_t r = 0; r < x.count; ++r) {
    const float share_of_one = x.sum[r] == 0 ? 0.0f : 1 / x.sum[r];
    for (int64_t i = 0; i < x.width; ++i) x.out[r][i] = out[r * padded(x.width) + i] * share_of_one;
  }
}

}  // namespace

const AttentionLoops attention_loops = {begin, query, over, finish, scratch_size};

}  // namespace xexport::XEXPORT_ISA
