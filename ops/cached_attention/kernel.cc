// xexport::cached_attention: (q [B,T,heads*K], k [B,T,G*K], v [B,T,G*V], k_cache [B,G,L,K], v_cache [B,G,L,V],
//                             pos [1]; heads, kv_heads = G, scale)
//                            -> (out [B,T,heads*V], new_k_cache, new_v_cache), pos + T <= L.
// The definition is reference.py; the arithmetic is in loops.cc. A unit of work is some rows of one head of keys.
#include <algorithm>
#include <cstring>

#include "../native/operator.h"
#include "loops.h"

namespace xexport {
namespace {

using ort::Element;

class CachedAttention {
 public:
  static constexpr const char* kName = "cached_attention";
  static constexpr Element kInputs[] = {Element::f32, Element::f32, Element::f32,
                                        Element::f32, Element::f32, Element::i64};
  static constexpr Element kOutputs[] = {Element::f32, Element::f32, Element::f32};
  static constexpr int kInPlace[] = {3, 1};
  static void infer(ort::ShapeContext* context) {
    infer_like(context, 3, 1, 4);
    infer_like(context, 4, 2, 4);
  }

  CachedAttention(const Node& node, Isa isa)
      : node_(node),
        heads_(node.integer("heads")),
        groups_(node.integer("kv_heads")),
        scale_(node.real("scale")),
        loops_(attention_loops(isa)) {
    if (groups_ < 1 || heads_ < 1 || heads_ % groups_ != 0) {
      node_.fail(std::to_string(heads_) + " heads for " + std::to_string(groups_) + " heads of keys");
    }
  }

  void compute(const Call& call) const {
    const Tensor q = call.input(0, "q"), k = call.input(1, "k"), v = call.input(2, "v");
    const Tensor k_cache = call.input(3, "k_cache"), v_cache = call.input(4, "v_cache"), pos = call.input(5, "pos");
    node_.expect(k_cache, Element::f32, {-1, groups_, -1, -1});
    const int64_t B = k_cache.dim[0], G = groups_, L = k_cache.dim[2], K = k_cache.dim[3];
    node_.expect(v_cache, Element::f32, {B, G, L, -1});
    const int64_t V = v_cache.dim[3];
    node_.expect(q, Element::f32, {B, -1, heads_ * K});
    const int64_t T = q.dim[1];
    node_.expect(k, Element::f32, {B, T, G * K});
    node_.expect(v, Element::f32, {B, T, G * V});
    node_.expect(pos, Element::i64, {1});
    const int64_t begin = *static_cast<const int64_t*>(pos.data);
    // T is at most a tensor's length, so the comparison can't overflow
    if (begin < 0 || begin > L - T) {
      node_.fail("a stream is longer than the cache: pos " + std::to_string(begin) + " and " + std::to_string(T) +
                 " tokens, a cache of " + std::to_string(L));
    }
    const int64_t shape[3] = {B, T, heads_ * V};
    float* out = call.output(0, shape, 3).floats();
    float* keys = call.output(1, k_cache.dim, 4).floats();
    float* values = call.output(2, v_cache.dim, 4).floats();
    const bool in_place = keys == k_cache.floats() && values == v_cache.floats();
    const double copied = static_cast<double>(B * G * (in_place ? T : L)) * static_cast<double>(K + V) / 8;
    call.parallel(B * G, copied, [&](int64_t unit) {
      append(keys, k_cache.floats(), k.floats(), unit, begin, T, L, K);
      append(values, v_cache.floats(), v.floats(), unit, begin, T, L, V);
    });
    const int64_t group = heads_ / G, rows = group * T, pieces = (rows + kAttentionRows - 1) / kAttentionRows;
    const double work = static_cast<double>(B * G * rows * (begin + T)) * static_cast<double>(K + V) / 8;
    call.parallel(B * G * pieces, work, [&](int64_t unit) {
      const int64_t piece = unit % pieces, b = unit / pieces / G, g = unit / pieces % G;
      AttentionRows head;
      head.size = K, head.width = V, head.scale = scale_;
      head.scratch = scratch(static_cast<size_t>(loops_.scratch(K, V)));
      const int64_t first = piece * kAttentionRows;
      head.count = std::min(kAttentionRows, rows - first);
      for (int64_t r = 0; r < head.count; ++r) {
        const int64_t t = (first + r) / group, line = (b * T + t) * heads_ + g * group + (first + r) % group;
        head.q[r] = q.floats() + line * K;
        head.out[r] = out + line * V;
        head.from[r] = 0, head.to[r] = begin + t + 1;
      }
      loops_.begin(head);
      loops_.over(head, {keys + (b * G + g) * L * K, values + (b * G + g) * L * V, K, V, begin + T});
      loops_.finish(head);
    });
  }

 private:
  // The cache [L, size] of one head of keys or values with the chunk's rows, which are G * size apart.
  void append(float* to, const float* from, const float* rows, int64_t unit, int64_t begin, int64_t T, int64_t L,
              int64_t size) const {
    to += unit * L * size;
    from += unit * L * size;
    rows += (unit / groups_ * T * groups_ + unit % groups_) * size;
    if (to != from) {
      copy(to, from, begin * size);
      copy(to + (begin + T) * size, from + (begin + T) * size, (L - begin - T) * size);
    }
    for (int64_t t = 0; t < T; ++t) copy(to + (begin + t) * size, rows + t * groups_ * size, size);
  }
  static void copy(float* to, const float* from, int64_t count) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  }

  Node node_;
  int64_t heads_, groups_;
  float scale_;
  const AttentionLoops& loops_;
};

const Registered<CachedAttention> registered;

}  // namespace
}  // namespace xexport
