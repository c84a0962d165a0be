// Dense products: of few rows as dense_few.h has it, else in blocks (gemm.h), with b copied into panels.
#pragma once
#include "dense_few.h"
#include "gemm.h"

namespace qgraph::QGRAPH_ISA {

// W vectors as the rows of a matrix, turned into its columns.
static inline void turn(V* v) {
#if defined(__AVX512F__)
  __m512 s[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {  // four rows: pairs of floats, then pairs of pairs
#pragma GCC unroll 16
    for (int j = 0; j < 4; j += 2) {
      s[i + j] = _mm512_unpacklo_ps(v[i + j].v, v[i + j + 1].v);
      s[i + j + 1] = _mm512_unpackhi_ps(v[i + j].v, v[i + j + 1].v);
    }
    for (int j = 0; j < 2; j++) {
      __m512d a = _mm512_castps_pd(s[i + j]), b = _mm512_castps_pd(s[i + j + 2]);
      t[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      t[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // t[4 g + c] has column c, c + 4, c + 8 and c + 12 of rows 4 g to 4 g + 3 in its quarters.
#pragma GCC unroll 16
  for (int c = 0; c < 4; c++) {
    __m512 low = _mm512_shuffle_f32x4(t[c], t[4 + c], 0x88);
    __m512 low2 = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0x88);
    __m512 high = _mm512_shuffle_f32x4(t[c], t[4 + c], 0xdd);
    __m512 high2 = _mm512_shuffle_f32x4(t[8 + c], t[12 + c], 0xdd);
    v[c].v = _mm512_shuffle_f32x4(low, low2, 0x88);
    v[4 + c].v = _mm512_shuffle_f32x4(high, high2, 0x88);
    v[8 + c].v = _mm512_shuffle_f32x4(low, low2, 0xdd);
    v[12 + c].v = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
#else
  float from[V::W][V::W], to[V::W];
  for (int i = 0; i < V::W; i++) store(from[i], v[i]);
  for (int i = 0; i < V::W; i++) {
    for (int j = 0; j < V::W; j++) to[j] = from[j][i];
    v[i] = load(to);
  }
#endif
}

// W lanes of a panel from at most W columns of b, each contiguous along k.
template <class E>
static void fill_turned(const typename E::T* b, int64_t apart, int columns, int64_t depth, float* panel) {
  V v[V::W];
  for (int64_t k = 0; k < depth; k += V::W) {
    int n = static_cast<int>(depth - k < V::W ? depth - k : V::W);
    for (int c = 0; c < V::W; c++)
      v[c] = c >= columns ? zero() : n == V::W ? E::load(b + c * apart + k) : E::load(b + c * apart + k, n);
    turn(v);
    for (int i = 0; i < n; i++) store(panel + (k + i) * LANES, v[i]);
  }
}

// The panels of b that gemm.h asks for.
template <class E> struct Panel {
  const Matmul& p;

  void operator()(int64_t n0, int columns, int64_t k0, int64_t k1, float* panel) const {
    auto* b = static_cast<const typename E::T*>(p.b) + k0 * p.b_row + n0 * p.b_column;
    for (int c = 0; c < columns; c += V::W) {
      int n = columns - c < V::W ? columns - c : V::W;
      if (p.b_row == 1) fill_turned<E>(b + c * p.b_column, p.b_column, n, k1 - k0, panel + c);
      else for (int64_t k = 0; k < k1 - k0; k++)
        store(panel + k * LANES + c, lanes(b + k * p.b_row + c * p.b_column, n));
    }
  }
  V lanes(const typename E::T* b, int n) const {
    if (p.b_column == 1) return n == V::W ? E::load(b) : E::load(b, n);
    typename E::T near[V::W];
    for (int i = 0; i < n; i++) near[i] = b[i * p.b_column];
    return E::load(near, n);
  }
};

static inline Product product(const Matmul& p) {
  return {p.a, p.type, p.a_row, p.a_column, nullptr, p.y, p.type, p.y_stride, nullptr, p.m, p.n, p.k};
}

// Problem i of a batch, the other way round where that makes it a product of one row.
static inline Matmul problem(Matmul p, int64_t i) {
  if (p.a_offsets) p.a = at(p.a, p.type, p.a_offsets[i]);
  if (p.b_offsets) p.b = at(p.b, p.type, p.b_offsets[i]);
  p.y = at(p.y, p.type, i * p.m * p.y_stride);
  p.batch = 1, p.a_offsets = p.b_offsets = nullptr;
  if (p.n > 1 || p.m == 1) return p;
  Matmul turned = p;
  turned.a = p.b, turned.a_row = p.b_column, turned.a_column = p.b_row;
  turned.b = p.a, turned.b_row = p.a_column, turned.b_column = p.a_row;
  turned.m = 1, turned.n = p.m, turned.y_stride = p.m;
  return turned;
}

static inline double work(const Matmul& p) {  // of one problem, in nanoseconds
  double bytes = 1.0 * p.k * (p.n + p.m) * size_of(p.type);
  return 2.0 * p.m * p.n * p.k / FLOPS + bytes / 20 + 100;
}

static inline int64_t row_floats(int64_t k) { return (k + 15) / 16 * 16 + 16; }

static inline void widen_rows(const Product& p, int64_t first, int64_t rows, float* x) {
  for (int64_t r = 0; r < rows; r++) widen_row(p, first + r, x + r * row_floats(p.k));
}

// One problem, its columns divided.
static void matmul_one(const Matmul& p) {
  if (!few_rows(p))
    return with(p.type, [&](auto e) { gemm(product(p), Panel<decltype(e)>{p}); });
  auto* x = static_cast<float*>(scratch(0, p.m * row_floats(p.k) * 4));
  widen_rows(product(p), 0, p.m, x);
  int64_t each = 262144 / (p.k * size_of(p.type));  // columns of a task: so many bytes of b
  if (p.b_column == 1) {  // but of rows of b long stretches
    int64_t share = p.n / (4 * threads());
    each = each > share ? each : share;
    each = each < 256 ? 256 : each > 4096 ? 4096 : each;
  }
  each = (each + V::W) / V::W * V::W;
  parallel((p.n + each - 1) / each, work(p), [&](int64_t i) {
    multiply_few(p, x, row_floats(p.k), i * each, p.n - i * each < each ? p.n - i * each : each);
  });
}

// One block of a problem on the thread that calls.
static void matmul_block(const Matmul& p, int64_t row0, int rows, int64_t n0, int columns) {
  auto* x = static_cast<float*>(scratch(7, rows * row_floats(p.k) * 4));
  widen_rows(product(p), row0, rows, x);
  if (few_rows(p)) return multiply_few(p, x, row_floats(p.k), n0, columns);
  with(p.type, [&](auto e) {
    gemm_block(product(p), Panel<decltype(e)>{p}, x, row_floats(p.k), row0, rows, n0, columns);
  });
}

// Problems large enough are divided, smaller ones are handed out in groups.
static void matmul(const Matmul& p) {
  double one = work(p);
  constexpr double LARGE = 4e5, TASK = 2e4;  // nanoseconds
  if (p.batch == 1 || one > LARGE) {
    for (int64_t i = 0; i < p.batch; i++) matmul_one(problem(p, i));
    return;
  }
  int64_t group = one > TASK ? 1 : static_cast<int64_t>(TASK / one);
  parallel((p.batch + group - 1) / group, one * p.batch, [&](int64_t task) {
    for (int64_t i = task * group; i < p.batch && i < (task + 1) * group; i++) {
      Matmul each = problem(p, i);
      for (int64_t row0 = 0; row0 < each.m; row0 += ROWS)
        for (int64_t n0 = 0; n0 < each.n; n0 += PANELS * LANES) {
          int64_t rows = each.m - row0, columns = each.n - n0;
          rows = rows < ROWS ? rows : ROWS, columns = columns < PANELS * LANES ? columns : PANELS * LANES;
          matmul_block(each, row0, static_cast<int>(rows), n0, static_cast<int>(columns));
        }
    }
  });
}

}  // namespace qgraph::QGRAPH_ISA
