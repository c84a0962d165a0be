// A matrix product in blocks, for many rows: y[m, n] = sum over k of x[m, k] w[k, n], sums in f32.
//
// `gemm(product, fill)` divides y into blocks of columns, one a task. Of w it knows only
//
//     fill(n0, columns, k0, k1, panel)
//
// which writes w[k, n] as a float to panel[(k - k0) * LANES + (n - n0)] for n0 <= n < n0 + columns and
// k0 <= k < k1, and zeros for the other lanes of the last vector in use. n0 is a multiple of LANES,
// columns <= LANES, k0 a multiple of DEPTH, k1 - k0 <= DEPTH. It runs on any thread and may use scratch slots
// 6 and 7; it is called once for every panel and every ROWS rows of y. So w may be packed, transposed or
// strided. Rows of x are widened to floats once (`x_column` is the stride of x along k); `x_rows` and
// `y_rows` are as in QuantizedMatmul: null, or which rows of x and y take part.
//
// The lanes of a vector are columns of y, so every m up to a block of rows has a kernel of its own size and
// none of its work is wasted; x is broadcast. Every DEPTH products are summed from zero and then added to y's
// sum: this also keeps the rounding errors of long sums small. No sum depends on how work is divided.
#pragma once
#include <cstring>

#include "pool.h"

namespace qgraph::QGRAPH_ISA {

// A block of sums in registers: TALL rows by WIDE vectors.
#if defined(__AVX512F__)
constexpr int TALL = 8, WIDE = 3;
constexpr double FLOPS = 100;  // a nanosecond, for estimates
#elif defined(__AVX2__)
constexpr int TALL = 6, WIDE = 2;
constexpr double FLOPS = 50;
#elif defined(__ARM_NEON)
constexpr int TALL = 6, WIDE = 4;
constexpr double FLOPS = 25;
#else
constexpr int TALL = 6, WIDE = 1;
constexpr double FLOPS = 10;
#endif
constexpr int LANES = WIDE * V::W;  // columns of a panel
constexpr int DEPTH = 512;          // k of a panel, of 96 KiB at most: from L2, again for every block of x
constexpr int ROWS = 256;           // rows of y that one filling of a panel serves
constexpr int PANELS = 4;           // of a task at most

struct Product {
  const void* x;
  Type x_type;
  int64_t x_stride, x_column;
  const int64_t* x_rows;
  void* y;
  Type y_type;
  int64_t y_stride;
  const int64_t* y_rows;
  int64_t m, n, k;
};

// R rows by C vectors of sums over k. `to` is set, or added to.
template <int R, int C>
static void multiply(const float* x, int64_t x_stride, const float* panel, int64_t k, float* to,
                     int64_t to_stride, bool add) {
  V sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) sums[r][c] = zero();
  for (int64_t i = 0; i < k; i++, panel += LANES) {
    V w[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) w[c] = load(panel + c * V::W);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      V a = set1(x[r * x_stride + i]);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sums[r][c] = fma(a, w[c], sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      float* sum = to + r * to_stride + c * V::W;
      store(sum, add ? load(sum) + sums[r][c] : sums[r][c]);
    }
}

// The same with `rows` and the columns in use chosen at run time.
template <int R, int C>
static inline void multiply(int rows, int vectors, const float* x, int64_t x_stride, const float* panel,
                            int64_t k, float* to, int64_t to_stride, bool add) {
  if constexpr (C > 1) {
    if (vectors < C) return multiply<R, C - 1>(rows, vectors, x, x_stride, panel, k, to, to_stride, add);
  }
  if constexpr (R > 1) {
    if (rows < R) return multiply<R - 1, C>(rows, vectors, x, x_stride, panel, k, to, to_stride, add);
  }
  multiply<R, C>(x, x_stride, panel, k, to, to_stride, add);
}

// Row `row` of the product's x as k floats.
static inline void widen_row(const Product& p, int64_t row, float* to) {
  const void* from = at(p.x, p.x_type, (p.x_rows ? p.x_rows[row] : row) * p.x_stride);
  if (p.x_column == 1) return widen(p.x_type, from, to, p.k);
  with(p.x_type, [&](auto e) {
    using E = decltype(e);
    auto* x = static_cast<const typename E::T*>(from);
    typename E::T near[V::W];
    for (int64_t k = 0; k < p.k; k += V::W) {
      int n = static_cast<int>(p.k - k < V::W ? p.k - k : V::W);
      for (int i = 0; i < n; i++) near[i] = x[(k + i) * p.x_column];
      store(to + k, E::load(near, n), n);
    }
  });
}

// Columns n0 to n0 + columns of `rows` rows of y from row0 on. x: those rows, as floats.
template <class Fill>
static void gemm_block(const Product& p, const Fill& fill, const float* x, int64_t x_stride, int64_t row0,
                       int rows, int64_t n0, int columns) {
  const int panels = (columns + LANES - 1) / LANES;
  constexpr int64_t PANEL = int64_t(DEPTH) * LANES;
  auto* panel = static_cast<float*>(scratch(4, panels * PANEL * 4));
  auto* sums = static_cast<float*>(scratch(5, int64_t(rows) * panels * LANES * 4));
  const int64_t stride = int64_t(panels) * LANES;
  const int blocks = (rows + TALL - 1) / TALL;
  if (p.k == 0) std::memset(sums, 0, rows * stride * 4);
  for (int64_t k0 = 0; k0 < p.k; k0 += DEPTH) {
    const int64_t k1 = p.k - k0 < DEPTH ? p.k : k0 + DEPTH;
    auto width = [&](int i) { return columns - i * LANES < LANES ? columns - i * LANES : LANES; };
    for (int i = 0; i < panels; i++) fill(n0 + i * LANES, width(i), k0, k1, panel + i * PANEL);
    for (int b = 0; b < blocks; b++) {
      const int r0 = b * rows / blocks, r1 = (b + 1) * rows / blocks;  // nearly equal blocks
      for (int i = 0; i < panels; i++)
        multiply<TALL, WIDE>(r1 - r0, (width(i) + V::W - 1) / V::W, x + r0 * x_stride + k0, x_stride,
                             panel + i * PANEL, k1 - k0, sums + r0 * stride + i * LANES, stride, k0 > 0);
    }
  }
  for (int r = 0; r < rows; r++) {
    const int64_t row = p.y_rows ? p.y_rows[row0 + r] : row0 + r;
    narrow(p.y_type, sums + r * stride, at(p.y, p.y_type, row * p.y_stride + n0), columns);
  }
}

template <class Fill> static void gemm(const Product& p, const Fill& fill) {
  // Not a power of two, which would put all rows in one set of L1.
  const int64_t x_stride = (p.k + 15) / 16 * 16 + 16;
  int64_t wide = PANELS;
  while (wide > 1 && (p.n + wide * LANES - 1) / (wide * LANES) < 8 * threads()) wide--;
  const int64_t tasks = (p.n + wide * LANES - 1) / (wide * LANES);
  for (int64_t row0 = 0; row0 < p.m; row0 += ROWS) {
    const int rows = static_cast<int>(p.m - row0 < ROWS ? p.m - row0 : ROWS);
    auto* x = static_cast<float*>(scratch(0, rows * x_stride * 4));
    parallel(rows, double(rows) * p.k / 8, [&](int64_t r) { widen_row(p, row0 + r, x + r * x_stride); });
    parallel(tasks, 2.0 * rows * p.n * p.k / FLOPS, [&](int64_t task) {
      const int64_t n0 = task * wide * LANES;
      const int columns = static_cast<int>(p.n - n0 < wide * LANES ? p.n - n0 : wide * LANES);
      gemm_block(p, fill, x, x_stride, row0, rows, n0, columns);
    });
  }
}

}  // namespace qgraph::QGRAPH_ISA
