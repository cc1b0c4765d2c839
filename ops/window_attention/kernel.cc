// xexport::window_attention: (q, q_sinks [B,T,heads*K], k [B,T,G*K], v [B,T,G*V], k_cache [B,G,S+C,K],
//                             v_cache [B,G,S+C,V], pos [1]; heads, kv_heads = G, window = W, sinks = S, scale)
//                            -> (out [B,T,heads*V], new_k_cache, new_v_cache), C >= W.
// The definition is reference.py; the arithmetic is cached_attention's. A unit of work is some rows of one head of
// keys. Old keys are read from the cache and the chunk's own from k; only then is the cache written, so that it may
// be the old one's memory.
#include <algorithm>
#include <cstring>

#include "../cached_attention/loops.h"
#include "../native/operator.h"

namespace xexport {
namespace {

using ort::Element;

class WindowAttention {
 public:
  static constexpr const char* kName = "window_attention";
  static constexpr Element kInputs[] = {Element::f32, Element::f32, Element::f32, Element::f32,
                                        Element::f32, Element::f32, Element::i64};
  static constexpr Element kOutputs[] = {Element::f32, Element::f32, Element::f32};
  static constexpr int kInPlace[] = {4, 1};
  static void infer(ort::ShapeContext* context) {
    infer_like(context, 4, 1, 4);
    infer_like(context, 5, 2, 4);
  }

  WindowAttention(const Node& node, Isa isa)
      : node_(node),
        heads_(node.integer("heads")),
        groups_(node.integer("kv_heads")),
        window_(node.integer("window")),
        sinks_(node.integer("sinks")),
        scale_(node.real("scale")),
        loops_(attention_loops(isa)) {
    if (groups_ < 1 || heads_ < 1 || heads_ % groups_ != 0) {
      node_.fail(std::to_string(heads_) + " heads for " + std::to_string(groups_) + " heads of keys");
    }
    if (window_ < 1 || sinks_ < 0) {
      node_.fail("a window of " + std::to_string(window_) + " tokens and " + std::to_string(sinks_) + " sinks");
    }
  }

  void compute(const Call& call) const {
    const Tensor q = call.input(0, "q"), q_sinks = call.input(1, "q_sinks"), k = call.input(2, "k");
    const Tensor v = call.input(3, "v"), k_cache = call.input(4, "k_cache"), v_cache = call.input(5, "v_cache");
    const Tensor pos = call.input(6, "pos");
    const int64_t G = groups_, S = sinks_;
    node_.expect(k_cache, Element::f32, {-1, G, -1, -1});
    const int64_t B = k_cache.dim[0], L = k_cache.dim[2], K = k_cache.dim[3], C = L - S;
    node_.expect(v_cache, Element::f32, {B, G, L, -1});
    const int64_t V = v_cache.dim[3];
    node_.expect(q, Element::f32, {B, -1, heads_ * K});
    const int64_t T = q.dim[1];
    node_.expect(q_sinks, Element::f32, {B, T, heads_ * K});
    node_.expect(k, Element::f32, {B, T, G * K});
    node_.expect(v, Element::f32, {B, T, G * V});
    node_.expect(pos, Element::i64, {1});
    if (C < window_) {
      node_.fail("a window of " + std::to_string(window_) + " tokens in a ring of " + std::to_string(C) + " rows");
    }
    const int64_t begin = *static_cast<const int64_t*>(pos.data);
    if (begin < 0 || begin > INT64_MAX / 2) node_.fail("pos is " + std::to_string(begin));
    const int64_t shape[3] = {B, T, heads_ * V};
    float* out = call.output(0, shape, 3).floats();
    float* keys = call.output(1, k_cache.dim, 4).floats();
    float* values = call.output(2, v_cache.dim, 4).floats();
    const int64_t group = heads_ / G, all = group * T, pieces = (all + kAttentionRows - 1) / kAttentionRows;
    const double seen = static_cast<double>(std::min(begin + T, S + window_));
    call.parallel(B * G * pieces, static_cast<double>(B * G * all) * seen * static_cast<double>(K + V) / 8,
                  [&](int64_t unit) {
      const int64_t first = unit % pieces * kAttentionRows, b = unit / pieces / G, g = unit / pieces % G;
      AttentionRows rows;
      rows.size = K, rows.width = V, rows.scale = scale_, rows.count = std::min(kAttentionRows, all - first);
      rows.scratch = scratch(static_cast<size_t>(loops_.scratch(K, V)));
      const auto token = [&](int64_t r) { return begin + (first + r) / group; };
      const auto line = [&](int64_t r) {
        return (b * T + (first + r) / group) * heads_ + g * group + (first + r) % group;
      };
      // Tokens from .. to - 1, which lie one behind the other at k and v; a row sees those from `low(n)` to n.
      const auto over = [&](int64_t from, int64_t to, const float* at_k, const float* at_v, int64_t apart,
                            auto&& low) {
        if (from >= to) return;
        for (int64_t r = 0; r < rows.count; ++r) {
          rows.from[r] = std::max(low(token(r)), from) - from;
          rows.to[r] = std::min(token(r) + 1, to) - from;
        }
        loops_.over(rows, {at_k, at_v, apart * K, apart * V, to - from});
      };
      const auto at_once = [](int64_t) { return int64_t{0}; };
      const auto near = [&](int64_t n) { return n - window_ + 1; };
      const float* old_k = k_cache.floats() + (b * G + g) * L * K;
      const float* old_v = v_cache.floats() + (b * G + g) * L * V;
      const float* own_k = k.floats() + (b * T * G + g) * K;
      const float* own_v = v.floats() + (b * T * G + g) * V;
      for (int64_t r = 0; r < rows.count; ++r) {
        rows.q[r] = (S > 0 ? q_sinks : q).floats() + line(r) * K;
        rows.out[r] = out + line(r) * V;
      }
      loops_.begin(rows);
      if (S > 0) {
        over(0, std::min(S, begin), old_k, old_v, 1, at_once);
        over(begin, std::min(S, begin + T), own_k, own_v, G, at_once);
        for (int64_t r = 0; r < rows.count; ++r) rows.q[r] = q.floats() + line(r) * K;
        loops_.query(rows);
      }
      // the ring lies in two pieces: from its oldest token in need to its end, and from its beginning
      const int64_t oldest = std::max({S, begin - C, near(token(0))});
      if (oldest < begin) {
        const int64_t row = (oldest - S) % C, turn = std::min(begin, oldest + C - row);
        over(oldest, turn, old_k + (S + row) * K, old_v + (S + row) * V, 1, near);
        over(turn, begin, old_k + S * K, old_v + S * V, 1, near);
      }
      const int64_t skip = std::max<int64_t>(0, S - begin);
      over(begin + skip, begin + T, own_k + skip * G * K, own_v + skip * G * V, G, near);
      loops_.finish(rows);
    });
    const bool in_place = keys == k_cache.floats() && values == v_cache.floats();
    const double copied = static_cast<double>(B * G * (in_place ? T : L)) * static_cast<double>(K + V) / 8;
    call.parallel(B * G, copied, [&](int64_t unit) {
      append(keys, k_cache.floats(), k.floats(), unit, begin, T, L, K);
      append(values, v_cache.floats(), v.floats(), unit, begin, T, L, V);
    });
  }

 private:
  // The cache [L, size] of one head of keys or values with the chunk's tokens, which are G * size apart.
  void append(float* to, const float* from, const float* rows, int64_t unit, int64_t begin, int64_t T, int64_t L,
              int64_t size) const {
    to += unit * L * size;
    from += unit * L * size;
    rows += (unit / groups_ * T * groups_ + unit % groups_) * size;
    const auto bytes = static_cast<size_t>(size) * sizeof(float);
    if (to != from) std::memcpy(to, from, static_cast<size_t>(L) * bytes);
    const int64_t C = L - sinks_;
    for (int64_t t = 0; t < T; ++t) {
      const int64_t n = begin + t;
      if (n >= sinks_ && n < begin + T - C) continue;  // overwritten in this very chunk
      const int64_t row = n < sinks_ ? n : sinks_ + (n - sinks_) % C;
      std::memcpy(to + row * size, rows + t * groups_ * size, bytes);
    }
  }

  Node node_;
  int64_t heads_, groups_, window_, sinks_;
  float scale_;
  const AttentionLoops& loops_;
};

const Registered<WindowAttention> registered;

}  // namespace
}  // namespace xexport
