// The recurrences of Mamba-1 and RWKV-7 with their adjoints, for training on a CPU (zoo/native.py).
//
// States are kept only at the start of every block of BLOCK tokens; the backward pass computes the states
// inside a block again. Sizes of the state are template arguments, so that the inner loops unroll and
// vectorise; the equations are those of ops/selective_scan/parallel.py and of ops/wkv7/reference.py.
// All arrays are dense float32, in the shapes named below, batch first.
#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int BLOCK = 16;

int blocks(int tokens) { return (tokens + BLOCK - 1) / BLOCK; }

// dt, q, y [T,D]; A [D,N]; B, C [T,N]; h [D,N] (in: before the first token, out: after the last);
// kept [blocks,D,N].
template <int N>
void scan_forward(int T, int D, const float* dt, const float* q, const float* A, const float* B, const float* C,
                  float* h, float* y, float* kept) {
  for (int first = 0; first < T; first += BLOCK) {
    std::copy(h, h + size_t(D) * N, kept + size_t(first / BLOCK) * D * N);
    const int last = std::min(first + BLOCK, T);
    for (int d = 0; d < D; ++d) {
      float s[N];
      const float* a = A + size_t(d) * N;
      std::copy(h + size_t(d) * N, h + size_t(d + 1) * N, s);
      for (int t = first; t < last; ++t) {
        const float step = dt[size_t(t) * D + d], in = q[size_t(t) * D + d];
        const float *b = B + size_t(t) * N, *c = C + size_t(t) * N;
        float out = 0;
        for (int n = 0; n < N; ++n) {
          s[n] = std::exp(step * a[n]) * s[n] + in * b[n];
          out += s[n] * c[n];
        }
        y[size_t(t) * D + d] = out;
      }
      std::copy(s, s + N, h + size_t(d) * N);
    }
  }
}

// As above; gy [T,D] comes in, the others go out (gA is added to).
template <int N>
void scan_backward(int T, int D, const float* dt, const float* q, const float* A, const float* B, const float* C,
                   const float* kept, const float* gy, float* gdt, float* gq, float* gA, float* gB, float* gC) {
  std::vector<float> carried(size_t(D) * N, 0.0f);
  std::fill(gB, gB + size_t(T) * N, 0.0f);
  std::fill(gC, gC + size_t(T) * N, 0.0f);
  for (int block = blocks(T) - 1; block >= 0; --block) {
    const int first = block * BLOCK, count = std::min(BLOCK, T - first);
    for (int d = 0; d < D; ++d) {
      float h[BLOCK + 1][N], e[BLOCK][N], G[N], sumA[N];
      const float* a = A + size_t(d) * N;
      std::copy(kept + (size_t(block) * D + d) * N, kept + (size_t(block) * D + d + 1) * N, h[0]);
      for (int i = 0; i < count; ++i) {
        const size_t at = size_t(first + i) * D + d;
        const float step = dt[at], in = q[at];
        const float* b = B + size_t(first + i) * N;
#pragma GCC ivdep
        for (int n = 0; n < N; ++n) {
          e[i][n] = std::exp(step * a[n]);
          h[i + 1][n] = e[i][n] * h[i][n] + in * b[n];
        }
      }
      std::copy(carried.data() + size_t(d) * N, carried.data() + size_t(d + 1) * N, G);
      std::fill(sumA, sumA + N, 0.0f);
      for (int i = count - 1; i >= 0; --i) {
        const size_t t = first + i, at = t * D + d;
        const float step = dt[at], in = q[at], g = gy[at];
        const float *__restrict b = B + t * N, *__restrict c = C + t * N;
        float *__restrict gb = gB + t * N, *__restrict gc = gC + t * N;
        float to_q = 0, to_dt = 0;
#pragma GCC ivdep
        for (int n = 0; n < N; ++n) {
          const float now = G[n] + c[n] * g;
          gc[n] += h[i + 1][n] * g;
          gb[n] += now * in;
          to_q += now * b[n];
          const float back = now * e[i][n], m = back * h[i][n];
          sumA[n] += m * step;
          to_dt += m * a[n];
          G[n] = back;
        }
        gq[at] = to_q;
        gdt[at] = to_dt;
      }
      std::copy(G, G + N, carried.data() + size_t(d) * N);
      for (int n = 0; n < N; ++n) gA[size_t(d) * N + n] += sumA[n];
    }
  }
}

// One head, states stored [key][value]. The six inputs and y are [T,H,N]; `row` = H*N is the stride of a token.
template <int N>
void wkv_step(const float* w, const float* k, const float* v, const float* a, const float* b, const float (*S)[N],
              float (*next)[N], float* removed) {
  float sa[N] = {};
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) sa[j] += S[i][j] * a[i];
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j) next[i][j] = S[i][j] * w[i] + sa[j] * b[i] + v[j] * k[i];
  std::copy(sa, sa + N, removed);
}

template <int N>
void wkv_forward(int T, int row, const float* r, const float* w, const float* k, const float* v, const float* a,
                 const float* b, float (*S)[N], float* y, float* kept) {
  float removed[N];
  for (int t = 0; t < T; ++t) {
    if (t % BLOCK == 0) std::copy(&S[0][0], &S[0][0] + N * N, kept + size_t(t / BLOCK) * N * N);
    const size_t at = size_t(t) * row;
    wkv_step<N>(w + at, k + at, v + at, a + at, b + at, S, S, removed);
    float out[N] = {};
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < N; ++j) out[j] += S[i][j] * r[at + i];
    std::copy(out, out + N, y + at);
  }
}

template <int N>
void wkv_backward(int T, int row, const float* r, const float* w, const float* k, const float* v, const float* a,
                  const float* b, const float* kept, const float* gy, float* gr, float* gw, float* gk, float* gv,
                  float* ga, float* gb) {
  std::vector<float> states(size_t(BLOCK + 1) * N * N);
  auto S = reinterpret_cast<float (*)[N][N]>(states.data());
  float removed[BLOCK][N], G[N][N] = {};
  for (int block = blocks(T) - 1; block >= 0; --block) {
    const int first = block * BLOCK, count = std::min(BLOCK, T - first);
    std::copy(kept + size_t(block) * N * N, kept + size_t(block + 1) * N * N, &S[0][0][0]);
    for (int i = 0; i < count; ++i) {
      const size_t at = size_t(first + i) * row;
      wkv_step<N>(w + at, k + at, v + at, a + at, b + at, S[i], S[i + 1], removed[i]);
    }
    for (int i = count - 1; i >= 0; --i) {
      const size_t at = size_t(first + i) * row;
      const float *before = &S[i][0][0], *after = &S[i + 1][0][0], *g = gy + at, *sa = removed[i], *vv = v + at;
      float to_sa[N] = {}, to_v[N] = {};
      for (int m = 0; m < N; ++m) {
        float sr = 0, sw = 0, sb = 0, sk = 0;
        const float rm = r[at + m], bm = b[at + m], km = k[at + m];
#pragma GCC ivdep
        for (int j = 0; j < N; ++j) {
          const float now = G[m][j] + g[j] * rm;
          G[m][j] = now;
          sr += after[m * N + j] * g[j];
          sw += before[m * N + j] * now;
          sb += sa[j] * now;
          sk += vv[j] * now;
          to_sa[j] += now * bm;
          to_v[j] += now * km;
        }
        gr[at + m] = sr, gw[at + m] = sw, gb[at + m] = sb, gk[at + m] = sk;
      }
      for (int m = 0; m < N; ++m) {
        float s = 0;
        const float am = a[at + m], wm = w[at + m];
        for (int j = 0; j < N; ++j) {
          s += before[m * N + j] * to_sa[j];
          G[m][j] = G[m][j] * wm + to_sa[j] * am;
        }
        ga[at + m] = s;
      }
      std::copy(to_v, to_v + N, gv + at);
    }
  }
}

template <int N>
void wkv_all(int batch, int T, int H, const float* const* in, float* S, float* y, float* kept, const float* gy,
             float* const* out) {
  for (int item = 0; item < batch; ++item)
    for (int head = 0; head < H; ++head) {
      const size_t at = (size_t(item) * T * H + head) * N, one = size_t(item) * H + head;
      float* saved = kept + one * blocks(T) * N * N;
      const float *r = in[0] + at, *w = in[1] + at, *k = in[2] + at, *v = in[3] + at, *a = in[4] + at, *b = in[5] + at;
      if (!gy) {
        wkv_forward<N>(T, H * N, r, w, k, v, a, b, reinterpret_cast<float (*)[N]>(S + one * N * N), y + at, saved);
      } else {
        wkv_backward<N>(T, H * N, r, w, k, v, a, b, saved, gy + at, out[0] + at, out[1] + at, out[2] + at,
                        out[3] + at, out[4] + at, out[5] + at);
      }
    }
}

template <int N>
void scan_all(int batch, int T, int D, const float* const* in, float* h, float* y, float* kept, const float* gy,
              float* const* out) {
  for (int item = 0; item < batch; ++item) {
    const size_t wide = size_t(item) * T * D, thin = size_t(item) * T * N;
    float* saved = kept + size_t(item) * blocks(T) * D * N;
    const float *dt = in[0] + wide, *q = in[1] + wide, *A = in[2], *B = in[3] + thin, *C = in[4] + thin;
    if (!gy) {
      scan_forward<N>(T, D, dt, q, A, B, C, h + size_t(item) * D * N, y + wide, saved);
    } else {
      scan_backward<N>(T, D, dt, q, A, B, C, saved, gy + wide, out[0] + wide, out[1] + wide, out[2], out[3] + thin,
                       out[4] + thin);
    }
  }
}

}  // namespace

// Both return 0, or 1 for a state size that is not compiled in. Without gy they run forward, else backward.
extern "C" int xexport_train_scan(int n, int batch, int T, int D, const float* const* in, float* state, float* y,
                                  float* kept, const float* gy, float* const* out) {
  if (n == 4) return scan_all<4>(batch, T, D, in, state, y, kept, gy, out), 0;
  if (n == 8) return scan_all<8>(batch, T, D, in, state, y, kept, gy, out), 0;
  if (n == 16) return scan_all<16>(batch, T, D, in, state, y, kept, gy, out), 0;
  return 1;
}

extern "C" int xexport_train_wkv7(int n, int batch, int T, int H, const float* const* in, float* state, float* y,
                                  float* kept, const float* gy, float* const* out) {
  if (n == 16) return wkv_all<16>(batch, T, H, in, state, y, kept, gy, out), 0;
  if (n == 32) return wkv_all<32>(batch, T, H, in, state, y, kept, gy, out), 0;
  if (n == 64) return wkv_all<64>(batch, T, H, in, state, y, kept, gy, out), 0;
  return 1;
}
