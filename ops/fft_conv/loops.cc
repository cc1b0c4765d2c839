// A convolution of real rows by transforms of as many complex points, one row in each lane.
//
// Rows u and h of at most M points are evaluated as polynomials at the M roots of z^M = i. The product of
// the values is the product of the polynomials modulo z^M - i: its coefficient n is y[n] + i y[n + M], so the
// real part is the causal convolution and the part that would wrap around is the imaginary one. Against the
// usual transform of 2 M zero-padded points, packed as M complex ones, this needs no separation of the two
// spectra afterwards, and the filter's takes half the memory.
// (Right-angle convolution: H. J. Nussbaumer, "Fast Fourier Transform and Convolution Algorithms", 1982.)
//
// With w = e^(i pi / 2M), a root is w e^(-2 pi i k / M): u[n] times w^n, then a DFT. The forward transform
// decimates in frequency and leaves the points in a permuted order; the inverse runs its passes backwards
// from that order. Both are depth first, and where a block fits the cache its forward passes, its product
// with the filter and its inverse passes are done at once.
#include "loops.h"

#include "../native/simd.h"

namespace xexport::XEXPORT_ISA {
namespace {

constexpr int64_t kCached = 256;  // points of a block: 16 KB for AVX2, beside as much of the spectrum

struct Complex {
  Vec re, im;
};

XEXPORT_INLINE Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
XEXPORT_INLINE Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
XEXPORT_INLINE Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
// a w or, for the inverse, a times the conjugate of w.
template <bool Inverse>
XEXPORT_INLINE Complex turned(Complex a, const float* w) {
  const Vec c = all(w[0]), s = all(w[1]);
  if (Inverse) return {a.re * c + a.im * s, a.im * c - a.re * s};
  return {a.re * c - a.im * s, a.re * s + a.im * c};
}
// -i a or, for the inverse, i a.
template <bool Inverse>
XEXPORT_INLINE Complex quarter(Complex a) {
  if (Inverse) return {-a.im, a.re};
  return {a.im, -a.re};
}

// cos and sin of 2 pi k / 3 and 2 pi k / 5
constexpr float kCos[6][3] = {{}, {}, {}, {1, -0.5f}, {}, {1, 0.309016994f, -0.809016994f}};
constexpr float kSin[6][3] = {{}, {}, {}, {0, 0.866025404f}, {}, {0, 0.951056516f, 0.587785252f}};

// A DFT of Radix points in place, in natural order, unnormalised.
template <int Radix, bool Inverse>
XEXPORT_INLINE void dft(Complex* x) {
  if constexpr (Radix == 2) {
    const Complex a = x[0], b = x[1];
    x[0] = a + b;
    x[1] = a - b;
  } else if constexpr (Radix == 4) {
    const Complex a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = quarter<Inverse>(x[1] - x[3]);
    x[0] = a + c;
    x[1] = b + d;
    x[2] = a - c;
    x[3] = b - d;
  } else {
    constexpr int half = Radix / 2;  // odd: outputs k and Radix - k share their sums
    Complex even[half + 1], odd[half + 1];
    Complex total = x[0];
    for (int m = 1; m <= half; ++m) {
      even[m] = x[m] + x[Radix - m];
      odd[m] = x[m] - x[Radix - m];
      total = total + even[m];
    }
    const Complex first = x[0];
    x[0] = total;
    for (int k = 1; k <= half; ++k) {
      Complex a = first, b = {};
      for (int m = 1; m <= half; ++m) {
        const int turn = m * k % Radix, folded = turn <= half ? turn : Radix - turn;
        const Vec c = all(kCos[Radix][folded]), s = all(turn <= half ? kSin[Radix][folded] : -kSin[Radix][folded]);
        a = {a.re + c * even[m].re, a.im + c * even[m].im};
        b = {b.re + s * odd[m].re, b.im + s * odd[m].im};
      }
      const Complex d = quarter<Inverse>(b);
      x[k] = a + d;
      x[Radix - k] = a - d;
    }
  }
}

// One pass over a block of `size` points: Radix blocks of size / Radix points, or back.
template <int Radix, bool Inverse>
void pass(Complex* x, int64_t size, const float* twiddles) {
  const int64_t part = size / Radix;
  for (int64_t j = 0; j < part; ++j) {
    const float* w = twiddles + j * 2 * (Radix - 1);
    Complex v[Radix];
    for (int k = 0; k < Radix; ++k) v[k] = x[j + k * part];
    if constexpr (Inverse) {
      for (int k = 1; k < Radix; ++k) v[k] = turned<true>(v[k], w + 2 * (k - 1));
    }
    dft<Radix, Inverse>(v);
    if constexpr (!Inverse) {
      for (int k = 1; k < Radix; ++k) v[k] = turned<false>(v[k], w + 2 * (k - 1));
    }
    for (int k = 0; k < Radix; ++k) x[j + k * part] = v[k];
  }
}

// The last pass, whose twiddle factors are 1.
template <int Radix, bool Inverse>
void last_pass(Complex* x, int64_t size) {
  for (int64_t j = 0; j < size; j += Radix) dft<Radix, Inverse>(x + j);
}

// The passes of a block that fits the cache, breadth first.
void forward_cached(Complex* x, int64_t size, const float* const* level) {
  int64_t block = size;
  for (; block >= 8; block /= 4, ++level) {
    for (int64_t j = 0; j < size; j += block) pass<4, false>(x + j, block, *level);
  }
  if (block == 4) last_pass<4, false>(x, size);
  if (block == 2) last_pass<2, false>(x, size);
}

void inverse_cached(Complex* x, int64_t size, const float* const* level) {
  int64_t block = size, depth = 0;
  for (; block >= 8; block /= 4) ++depth;
  if (block == 4) last_pass<4, true>(x, size);
  if (block == 2) last_pass<2, true>(x, size);
  for (; depth > 0; --depth) {
    block *= 4;
    for (int64_t j = 0; j < size; j += block) pass<4, true>(x + j, block, level[depth - 1]);
  }
}

void forward(Complex* x, int64_t size, const float* const* level) {
  if (size <= kCached) {
    forward_cached(x, size, level);
    return;
  }
  pass<4, false>(x, size, *level);
  for (int64_t k = 0; k < 4; ++k) forward(x + k * (size / 4), size / 4, level + 1);
}

// Forward, times the spectrum, and back.
void filter(Complex* x, int64_t size, const float* const* level, const Complex* spectrum) {
  if (size <= kCached) {
    forward_cached(x, size, level);
    for (int64_t k = 0; k < size; ++k) x[k] = x[k] * spectrum[k];
    inverse_cached(x, size, level);
    return;
  }
  pass<4, false>(x, size, *level);
  for (int64_t k = 0, part = size / 4; k < 4; ++k) filter(x + k * part, part, level + 1, spectrum + k * part);
  pass<4, true>(x, size, *level);
}

template <int Radix>
void forward_odd(const PlanTables& plan, Complex* x) {
  if constexpr (Radix > 1) pass<Radix, false>(x, plan.size, plan.odd);
  const int64_t part = plan.size / Radix;
  for (int64_t k = 0; k < Radix; ++k) forward(x + k * part, part, plan.levels);
}

template <int Radix>
void filter_odd(const PlanTables& plan, Complex* x, const Complex* spectrum) {
  if constexpr (Radix > 1) pass<Radix, false>(x, plan.size, plan.odd);
  const int64_t part = plan.size / Radix;
  for (int64_t k = 0; k < Radix; ++k) filter(x + k * part, part, plan.levels, spectrum + k * part);
  if constexpr (Radix > 1) pass<Radix, true>(x, plan.size, plan.odd);
}

// Rows into lanes, times scale w^n, zeros behind.
void spread(const PlanTables& plan, const float* from, int64_t stride, int64_t points, int64_t rows, float scale,
            Complex* x) {
  for (int64_t n = 0; n < points; n += kLanes) {
    const int64_t count = points - n < kLanes ? points - n : kLanes;
    Vec tile[kLanes];
    if (rows == kLanes && count == kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) tile[i] = load(from + i * stride + n);
    } else {
      for (int i = 0; i < kLanes; ++i) tile[i] = Vec{};
      for (int64_t i = 0; i < rows; ++i) tile[i] = load_part(from + i * stride + n, count);
    }
    transpose(tile);
    for (int64_t i = 0; i < count; ++i) {
      const float* w = plan.twist + 2 * (n + i);
      x[n + i] = {tile[i] * all(scale * w[0]), tile[i] * all(scale * w[1])};
    }
  }
  for (int64_t n = points; n < plan.size; ++n) x[n] = Complex{Vec{}, Vec{}};
}

// The real part of x[n] w^-n for n = begin .. end - 1, lanes into rows.
void gather(const PlanTables& plan, const Complex* x, const SignalRows& rows) {
  for (int64_t n = rows.begin; n < rows.points; n += kLanes) {
    const int64_t count = rows.points - n < kLanes ? rows.points - n : kLanes;
    Vec tile[kLanes];
    for (int64_t i = count; i < kLanes; ++i) tile[i] = Vec{};
    for (int64_t i = 0; i < count; ++i) {
      const float* w = plan.twist + 2 * (n + i);
      tile[i] = x[n + i].re * all(w[0]) + x[n + i].im * all(w[1]);
    }
    transpose(tile);
    float* y = rows.y + (n - rows.begin);
    for (int64_t i = 0; i < rows.rows; ++i) {
      if (count == kLanes) {
        store(y + i * rows.y_stride, tile[i]);
      } else {
        store_part(y + i * rows.y_stride, tile[i], count);
      }
    }
  }
}

void transform(const PlanTables& plan, const FilterRows& rows, float* spectrum) {
  auto* x = reinterpret_cast<Complex*>(spectrum);
  // the inverse transform's 1 / size is put into the filter
  spread(plan, rows.h, rows.stride, rows.taps, rows.rows, 1.0f / static_cast<float>(plan.size), x);
  if (plan.first == 3) {
    forward_odd<3>(plan, x);
  } else if (plan.first == 5) {
    forward_odd<5>(plan, x);
  } else {
    forward_odd<1>(plan, x);
  }
}

void convolve(const PlanTables& plan, const SignalRows& rows, const float* spectrum, float* work) {
  auto* x = reinterpret_cast<Complex*>(work);
  const auto* values = reinterpret_cast<const Complex*>(spectrum);
  spread(plan, rows.u, rows.u_stride, rows.points, rows.rows, 1.0f, x);
  if (plan.first == 3) {
    filter_odd<3>(plan, x, values);
  } else if (plan.first == 5) {
    filter_odd<5>(plan, x, values);
  } else {
    filter_odd<1>(plan, x, values);
  }
  gather(plan, x, rows);
}

float output(const float* u, const float* h, int64_t t) {
  const int64_t count = t + 1;
  Vec partial[4] = {};
  int64_t s = 0;
  for (; s + 4 * kLanes <= count; s += 4 * kLanes) {
    for (int q = 0; q < 4; ++q) {
      const int64_t at = s + q * kLanes;
      partial[q] += load(u + at) * reversed(load(h + t - at - (kLanes - 1)));
    }
  }
  for (; s + kLanes <= count; s += kLanes) partial[0] += load(u + s) * reversed(load(h + t - s - (kLanes - 1)));
  float total = sum((partial[0] + partial[1]) + (partial[2] + partial[3]));
  for (; s < count; ++s) total += u[s] * h[t - s];
  return total;
}

}  // namespace

const ConvolutionLoops convolution_loops = {kLanes, transform, convolve, output};

}  // namespace xexport::XEXPORT_ISA
