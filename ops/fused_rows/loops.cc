// Row-wise operations on vectors of floats, and the loop that runs a program of them.
#include "loops.h"

#include "../native/exp.h"
#include "../native/simd.h"

namespace xexport::XEXPORT_ISA {
namespace {

XEXPORT_INLINE Vec select(IntVec condition, Vec yes, Vec no) { return condition ? yes : no; }
XEXPORT_INLINE Vec with_sign_of(Vec size, Vec sign) {
  IntVec a, b;
  std::memcpy(&a, &size, sizeof(a));
  std::memcpy(&b, &sign, sizeof(b));
  a = (a & 0x7fffffff) | (b & static_cast<int32_t>(0x80000000));
  Vec result;
  std::memcpy(&result, &a, sizeof(result));
  return result;
}
XEXPORT_INLINE Vec exponential(Vec x) { return exp2_any(x, all(kLog2E)); }
XEXPORT_INLINE Vec logistic(Vec x) { return all(1.0f) / (all(1.0f) + exponential(-x)); }

// Near 0 a polynomial keeps the relative error (fitted on |x| < 0.55: 1e-9); beyond, 1 - 2 / (e^2x + 1).
XEXPORT_INLINE Vec hyperbolic_tangent(Vec x) {
  const Vec size = magnitude(x), z = x * x;
  Vec p = all(-6.235556811e-03f) * z + all(2.103967340e-02f);
  p = p * z + all(-5.384270672e-02f);
  p = p * z + all(1.333246074e-01f);
  p = p * z + all(-3.333331096e-01f);
  const Vec small = x + x * z * p;
  const Vec large = all(1.0f) - all(2.0f) / (exponential(size + size) + all(1.0f));
  return select(size < all(0.55f), small, with_sign_of(large, x));
}

// log(1 + e) for e in [0, 1], relative error 7e-10 before roundings.
XEXPORT_INLINE Vec log1p_unit(Vec e) {
  Vec p = all(2.030213867e-03f) * e + all(-1.340739281e-02f);
  p = p * e + all(4.147793587e-02f);
  p = p * e + all(-8.244141046e-02f);
  p = p * e + all(1.241841180e-01f);
  p = p * e + all(-1.610568086e-01f);
  p = p * e + all(1.989074487e-01f);
  p = p * e + all(-2.498727043e-01f);
  p = p * e + all(3.333255959e-01f);
  p = p * e + all(-4.999998143e-01f);
  p = p * e + all(9.999999993e-01f);
  return e * p;
}
XEXPORT_INLINE Vec softplus(Vec x) {
  const Vec positive = select(x < all(0.0f), all(0.0f), x);  // NaN stays
  return positive + log1p_unit(exponential(-magnitude(x)));
}

// erf: odd polynomial below 1; above, 1 - 2^-Q(|x|) with Q fitted to -log2(erfc) on [1, 4].
XEXPORT_INLINE Vec error_function(Vec x) {
  const Vec size = magnitude(x), z = x * x;
  Vec p = all(7.853857684e-05f) * z + all(-8.010192514e-04f);
  p = p * z + all(5.188327559e-03f);
  p = p * z + all(-2.685381187e-02f);
  p = p * z + all(1.128358515e-01f);
  p = p * z + all(-3.761262582e-01f);
  p = p * z + all(1.128379166e+00f);
  const Vec s = select(size > all(4.0f), all(4.0f), size);
  Vec q = all(2.118148754e-05f) * s + all(-4.921532389e-04f);
  q = q * s + all(5.200681734e-03f);
  q = q * s + all(-3.356392349e-02f);
  q = q * s + all(1.511094408e-01f);
  q = q * s + all(9.193981407e-01f);
  q = q * s + all(1.626150135e+00f);
  q = q * s + all(5.933237190e-04f);
  const Vec large = with_sign_of(all(1.0f) - exp2_any(-q, all(1.0f)), x);
  return select(size < all(1.0f), x * p, large);
}

template <class F>
XEXPORT_INLINE void map(const float* a, float* to, int64_t n, F f) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(to + j, f(load(a + j)));
  if (j < n) store_part(to + j, f(load_part(a + j, n - j)), n - j);
}

template <class F>
XEXPORT_INLINE void zip(const float* a, bool a_single, const float* b, bool b_single, float* to, int64_t n, F f) {
  int64_t j = 0;
  if (a_single || b_single) {
    const Vec same = all(a_single ? *a : *b);
    for (; j + kLanes <= n; j += kLanes) {
      store(to + j, f(a_single ? same : load(a + j), b_single ? (a_single ? all(*b) : same) : load(b + j)));
    }
    if (j < n) {
      const Vec left = a_single ? same : load_part(a + j, n - j);
      const Vec right = b_single ? (a_single ? all(*b) : same) : load_part(b + j, n - j);
      store_part(to + j, f(left, right), n - j);
    }
    return;
  }
  for (; j + kLanes <= n; j += kLanes) store(to + j, f(load(a + j), load(b + j)));
  if (j < n) store_part(to + j, f(load_part(a + j, n - j), load_part(b + j, n - j)), n - j);
}

template <class F>
XEXPORT_INLINE void each(const RowInstruction& i, const float* a, const float* b, float* to, F f) {
  for (int64_t o = 0; o < i.outer; ++o) {
    zip(a + o * i.a_step, i.a_single, b + o * i.b_step, i.b_single, to + o * i.inner, i.inner, f);
  }
}

template <class F>
XEXPORT_INLINE float total(const float* a, int64_t n, F f) {
  Vec sums[2] = {};
  int64_t j = 0;
  for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
    sums[0] += f(load(a + j));
    sums[1] += f(load(a + j + kLanes));
  }
  for (; j + kLanes <= n; j += kLanes) sums[0] += f(load(a + j));
  float rest = 0;
  if (j < n) {
    alignas(kBytes) float lanes[kLanes];
    store(lanes, f(load_part(a + j, n - j)));
    for (int64_t k = 0; k < n - j; ++k) rest += lanes[k];
  }
  return sum(sums[0] + sums[1]) + rest;
}

float largest(const float* a, int64_t n) {
  float best = a[0];
  for (int64_t j = 1; j < n; ++j) best = (best < a[j] || a[j] != a[j]) ? a[j] : best;
  return best;
}

void layer_norm(const float* a, const float* weight, const float* bias, float epsilon, float* to, int64_t n) {
  const float mean = total(a, n, [](Vec v) { return v; }) / static_cast<float>(n);
  const Vec center = all(mean);
  const float square = total(a, n, [=](Vec v) { return (v - center) * (v - center); });
  const Vec scale = all(1.0f / __builtin_sqrtf(square / static_cast<float>(n) + epsilon));
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const Vec y = (load(a + j) - center) * scale * load(weight + j);
    store(to + j, bias != nullptr ? y + load(bias + j) : y);
  }
  for (; j < n; ++j) to[j] = (a[j] - mean) * scale[0] * weight[j] + (bias != nullptr ? bias[j] : 0.0f);
}

void rms_norm(const float* a, const float* weight, float epsilon, float* to, int64_t n) {
  const float square = total(a, n, [](Vec v) { return v * v; });
  const Vec scale = all(1.0f / __builtin_sqrtf(square / static_cast<float>(n) + epsilon));
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(to + j, load(a + j) * scale * load(weight + j));
  for (; j < n; ++j) to[j] = a[j] * scale[0] * weight[j];
}

void mul_add(const float* a, const float* b, const float* c, float* to, int64_t n) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) store(to + j, load(a + j) * load(b + j) + load(c + j));
  for (; j < n; ++j) to[j] = a[j] * b[j] + c[j];
}

void pick(const RowInstruction& i, const float* a, float* to) {
  if (i.inner == 1) {
    for (int64_t o = 0; o < i.outer; ++o) to[o] = a[o * i.a_step];
    return;
  }
  for (int64_t o = 0; o < i.outer; ++o) {
    const float* from = a + o * i.a_step;
    if (i.b_step == 1) {
      std::memcpy(to + o * i.inner, from, static_cast<size_t>(i.inner) * sizeof(float));
    } else {
      for (int64_t j = 0; j < i.inner; ++j) to[o * i.inner + j] = from[j * i.b_step];
    }
  }
}

void place(const RowInstruction& i, const float* a, float* to) {
  if (i.inner == 1) {
    for (int64_t o = 0; o < i.outer; ++o) to[o * i.b_step] = a[o];
    return;
  }
  for (int64_t o = 0; o < i.outer; ++o) {
    std::memcpy(to + o * i.b_step, a + o * i.inner, static_cast<size_t>(i.inner) * sizeof(float));
  }
}

void run(const RowInstruction* instructions, int64_t count, float* const* places, const float* literals) {
  for (const RowInstruction* p = instructions; p < instructions + count; ++p) {
    const RowInstruction& i = *p;
    const float* a = places[i.a];
    const float* b = i.b < 0 ? nullptr : places[i.b];
    const float* c = i.c < 0 ? nullptr : places[i.c];
    float* to = places[i.dst];
    switch (i.op) {
      case RowOp::copy: std::memmove(to, a, static_cast<size_t>(i.inner) * sizeof(float)); break;
      case RowOp::neg: map(a, to, i.inner, [](Vec x) { return -x; }); break;
      case RowOp::abs: map(a, to, i.inner, [](Vec x) { return magnitude(x); }); break;
      case RowOp::exp: map(a, to, i.inner, [](Vec x) { return exponential(x); }); break;
      case RowOp::sqrt: for (int64_t j = 0; j < i.inner; ++j) to[j] = __builtin_sqrtf(a[j]); break;
      case RowOp::reciprocal: map(a, to, i.inner, [](Vec x) { return all(1.0f) / x; }); break;
      case RowOp::sigmoid: map(a, to, i.inner, [](Vec x) { return logistic(x); }); break;
      case RowOp::tanh: map(a, to, i.inner, [](Vec x) { return hyperbolic_tangent(x); }); break;
      case RowOp::relu: map(a, to, i.inner, [](Vec x) { return select(x < all(0.0f), all(0.0f), x); }); break;
      case RowOp::softplus: map(a, to, i.inner, [](Vec x) { return softplus(x); }); break;
      case RowOp::gelu:
        map(a, to, i.inner, [](Vec x) { return all(0.5f) * x * (all(1.0f) + error_function(x * all(0.707106781f))); });
        break;
      case RowOp::gelu_tanh:
        map(a, to, i.inner, [](Vec x) {
          return x * logistic(all(1.595769122f) * (x + all(0.044715f) * x * x * x));
        });
        break;
      case RowOp::erf: map(a, to, i.inner, [](Vec x) { return error_function(x); }); break;
      case RowOp::silu: map(a, to, i.inner, [](Vec x) { return x * logistic(x); }); break;
      case RowOp::add: each(i, a, b, to, [](Vec x, Vec y) { return x + y; }); break;
      case RowOp::sub: each(i, a, b, to, [](Vec x, Vec y) { return x - y; }); break;
      case RowOp::mul: each(i, a, b, to, [](Vec x, Vec y) { return x * y; }); break;
      case RowOp::div: each(i, a, b, to, [](Vec x, Vec y) { return x / y; }); break;
      // a comparison with NaN is false: each operand's own NaN gets through
      case RowOp::max: each(i, a, b, to, [](Vec x, Vec y) { return select(x < y, y, select(y != y, y, x)); }); break;
      case RowOp::min: each(i, a, b, to, [](Vec x, Vec y) { return select(x > y, y, select(y != y, y, x)); }); break;
      case RowOp::sum:
        for (int64_t o = 0; o < i.outer; ++o) to[o] = total(a + o * i.inner, i.inner, [](Vec v) { return v; });
        break;
      case RowOp::mean:
        for (int64_t o = 0; o < i.outer; ++o) {
          to[o] = total(a + o * i.inner, i.inner, [](Vec v) { return v; }) / static_cast<float>(i.inner);
        }
        break;
      case RowOp::largest:
        for (int64_t o = 0; o < i.outer; ++o) to[o] = largest(a + o * i.inner, i.inner);
        break;
      case RowOp::l2:
        for (int64_t o = 0; o < i.outer; ++o) {
          to[o] = __builtin_sqrtf(total(a + o * i.inner, i.inner, [](Vec v) { return v * v; }));
        }
        break;
      case RowOp::layer_norm:
        for (int64_t o = 0; o < i.outer; ++o) {
          layer_norm(a + o * i.inner, b, c, literals[i.a_step], to + o * i.inner, i.inner);
        }
        break;
      case RowOp::rms_norm:
        for (int64_t o = 0; o < i.outer; ++o) {
          rms_norm(a + o * i.inner, b, literals[i.a_step], to + o * i.inner, i.inner);
        }
        break;
      case RowOp::mul_add: mul_add(a, b, c, to, i.inner); break;
      case RowOp::pick: pick(i, a, to); break;
      case RowOp::place: place(i, a, to); break;
      case RowOp::count: break;
    }
  }
}

}  // namespace

const RowLoops row_loops = {run};

}  // namespace xexport::XEXPORT_ISA
