// xexport::dilated_attention: (q, k [B,T,H*K], v [B,T,H*V], k_cache [B,H,R,K], v_cache [B,H,R,V], pos [1],
//                              segments [P], rates [P], offsets [P,H]; heads = H, scale)
//                             -> (out [B,T,H*V], new_k_cache, new_v_cache), R = sum of ceil(w / r).
// The definition is reference.py; the arithmetic is cached_attention's. The softmaxes of the pairs, mixed by their
// denominators, are one softmax over the runs of keys of all pairs, one run behind the other. A unit of work is
// some tokens of one head, as far apart as makes them take part in the same pairs. Old keys are read from the
// cache and the chunk's own from k; only then is the cache written, so that it may be the old one's memory.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "../cached_attention/loops.h"
#include "../native/operator.h"

namespace xexport {
namespace {

using ort::Element;

struct Pair {
  int64_t segment, rate, first, rows;  // rows of the cache: first .. first + rows - 1
  const int64_t* offsets;              // [H]
};

int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

class DilatedAttention {
 public:
  static constexpr const char* kName = "dilated_attention";
  static constexpr Element kInputs[] = {Element::f32, Element::f32, Element::f32, Element::f32, Element::f32,
                                        Element::i64, Element::i64, Element::i64, Element::i64};
  static constexpr Element kOutputs[] = {Element::f32, Element::f32, Element::f32};
  static constexpr int kInPlace[] = {3, 1};
  static void infer(ort::ShapeContext* context) {
    infer_like(context, 2, 0, 3);
    infer_like(context, 3, 1, 4);
    infer_like(context, 4, 2, 4);
  }

  DilatedAttention(const Node& node, Isa isa)
      : node_(node), heads_(node.integer("heads")), scale_(node.real("scale")), loops_(attention_loops(isa)) {
    if (heads_ < 1) node_.fail(std::to_string(heads_) + " heads");
  }

  void compute(const Call& call) const {
    const Tensor q = call.input(0, "q"), k = call.input(1, "k"), v = call.input(2, "v");
    const Tensor k_cache = call.input(3, "k_cache"), v_cache = call.input(4, "v_cache"), pos = call.input(5, "pos");
    const int64_t H = heads_;
    node_.expect(k_cache, Element::f32, {-1, H, -1, -1});
    const int64_t B = k_cache.dim[0], R = k_cache.dim[2], K = k_cache.dim[3];
    node_.expect(v_cache, Element::f32, {B, H, R, -1});
    const int64_t V = v_cache.dim[3];
    node_.expect(q, Element::f32, {B, -1, H * K});
    const int64_t T = q.dim[1];
    node_.expect(k, Element::f32, {B, T, H * K});
    node_.expect(v, Element::f32, {B, T, H * V});
    node_.expect(pos, Element::i64, {1});
    const int64_t begin = *static_cast<const int64_t*>(pos.data);
    if (begin < 0 || begin > INT64_MAX / 2) node_.fail("pos is " + std::to_string(begin));
    const std::vector<Pair> pairs = read(call, R);
    const int64_t shape[3] = {B, T, H * V};
    float* out = call.output(0, shape, 3).floats();
    float* keys = call.output(1, k_cache.dim, 4).floats();
    float* values = call.output(2, v_cache.dim, 4).floats();
    int64_t apart = 1;
    for (const Pair& p : pairs) apart = std::lcm(apart, p.rate) <= kMostApart ? std::lcm(apart, p.rate) : apart;
    const int64_t block = apart * kAttentionRows, pieces = parts_of(T, block) * apart;
    double seen = 0;
    for (const Pair& p : pairs) seen += static_cast<double>(p.rows) / static_cast<double>(p.rate);
    call.parallel(B * H * pieces, static_cast<double>(B * H * T) * seen * static_cast<double>(K + V) / 8,
                  [&](int64_t unit) {
      const int64_t piece = unit % pieces, b = unit / pieces / H, h = unit / pieces % H;
      const int64_t t = piece / apart * block + piece % apart, last = std::min(T, t + block);
      if (t >= last) return;
      AttentionRows rows;
      rows.size = K, rows.width = V, rows.scale = scale_, rows.count = parts_of(last - t, apart);
      rows.scratch = scratch(static_cast<size_t>(loops_.scratch(K, V)));
      for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t line = (b * T + t + r * apart) * H + h;
        rows.q[r] = q.floats() + line * K;
        rows.out[r] = out + line * V;
      }
      const float* own_k = k.floats() + (b * T * H + h) * K;
      const float* own_v = v.floats() + (b * T * H + h) * V;
      const float* old_k = k_cache.floats() + (b * H + h) * R * K;
      const float* old_v = v_cache.floats() + (b * H + h) * R * V;
      loops_.begin(rows);
      for (const Pair& p : pairs) {
        const int64_t to = (begin + t + (rows.count - 1) * apart) / p.segment;
        for (int64_t s = (begin + t) / p.segment; s <= to; ++s) {
          const int64_t start = s * p.segment + p.offsets[h];  // the segment's first place of this head
          // places behind the segment's end, if r does not divide w, are nobody's
          const int64_t end = std::min((s + 1) * p.segment, begin + T);
          const int64_t past = begin > start ? std::min(parts_of(begin - start, p.rate), p.rows) : 0;
          const int64_t own = start + past * p.rate;
          bool any = false;
          for (int64_t r = 0; r < rows.count; ++r) {
            const int64_t n = begin + t + r * apart;
            const bool sees = n >= start && n < end && (n - start) % p.rate == 0;
            rows.from[r] = 0;
            rows.to[r] = sees ? (n - start) / p.rate + 1 - past : 0;
            any = any || sees;
          }
          if (!any) continue;
          const int64_t fresh = own < end ? parts_of(end - own, p.rate) : 0;
          if (fresh > 0) {
            loops_.over(rows, {own_k + (own - begin) * H * K, own_v + (own - begin) * H * V, p.rate * H * K,
                               p.rate * H * V, fresh});
          }
          if (past > 0) {
            for (int64_t r = 0; r < rows.count; ++r) rows.to[r] = rows.to[r] > 0 ? past : 0;
            loops_.over(rows, {old_k + p.first * K, old_v + p.first * V, K, V, past});
          }
        }
      }
      loops_.finish(rows);
    });
    const bool in_place = keys == k_cache.floats() && values == v_cache.floats();
    const double copied = static_cast<double>(B * H * (in_place ? T : R)) * static_cast<double>(K + V) / 8;
    call.parallel(B * H, copied, [&](int64_t unit) {
      append(keys, k_cache.floats(), k.floats(), pairs, unit, begin, T, R, K);
      append(values, v_cache.floats(), v.floats(), pairs, unit, begin, T, R, V);
    });
  }

 private:
  static constexpr int64_t kMostApart = 64;  // tokens of a unit: some rates with a large common multiple would make it wide

  std::vector<Pair> read(const Call& call, int64_t R) const {
    const Tensor segments = call.input(6, "segments"), rates = call.input(7, "rates");
    const Tensor offsets = call.input(8, "offsets");
    node_.expect(segments, Element::i64, {-1});
    const int64_t count = segments.dim[0];
    node_.expect(rates, Element::i64, {count});
    node_.expect(offsets, Element::i64, {count, heads_});
    std::vector<Pair> pairs;
    int64_t rows = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t w = static_cast<const int64_t*>(segments.data)[i], r = static_cast<const int64_t*>(rates.data)[i];
      if (w < 1 || r < 1 || w > INT32_MAX || r > INT32_MAX) {
        node_.fail("a segment of " + std::to_string(w) + " tokens at a rate of " + std::to_string(r));
      }
      const int64_t* o = static_cast<const int64_t*>(offsets.data) + i * heads_;
      for (int64_t h = 0; h < heads_; ++h) {
        if (o[h] < 0 || o[h] >= r) node_.fail("an offset of " + std::to_string(o[h]) + " at a rate of " + std::to_string(r));
      }
      pairs.push_back({w, r, rows, parts_of(w, r), o});
      rows += parts_of(w, r);
    }
    if (rows != R) node_.fail("the caches have " + std::to_string(R) + " rows, the segments " + std::to_string(rows));
    return pairs;
  }

  // The cache [R, size] of one head of keys or values with the chunk's tokens, which are H * size apart.
  void append(float* to, const float* from, const float* rows, const std::vector<Pair>& pairs, int64_t unit,
              int64_t begin, int64_t T, int64_t R, int64_t size) const {
    const int64_t h = unit % heads_;
    to += unit * R * size;
    from += unit * R * size;
    rows += (unit / heads_ * T * heads_ + h) * size;
    const auto bytes = static_cast<size_t>(size) * sizeof(float);
    if (to != from) std::memcpy(to, from, static_cast<size_t>(R) * bytes);
    for (const Pair& p : pairs) {
      for (int64_t t = std::max<int64_t>(0, T - p.segment); t < T; ++t) {
        const int64_t place = (begin + t) % p.segment - p.offsets[h];
        if (place < 0 || place % p.rate != 0) continue;
        std::memcpy(to + (p.first + place / p.rate) * size, rows + t * heads_ * size, bytes);
      }
    }
  }

  Node node_;
  int64_t heads_;
  float scale_;
  const AttentionLoops& loops_;
};

const Registered<DilatedAttention> registered;

}  // namespace
}  // namespace xexport
