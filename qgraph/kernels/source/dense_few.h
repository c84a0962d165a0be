// Dense products of few rows: bound by reading b, so b is used as it lies, whichever axis is contiguous.
#pragma once
#include <cstring>

#include "gemm.h"

namespace qgraph::QGRAPH_ISA {

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr bool MANY_REGISTERS = true;  // 32
#else
constexpr bool MANY_REGISTERS = false;  // 16
#endif

// Few rows of x as floats, `x_stride` apart, times columns n0 to n0 + columns of b.
struct FewRows {
  const Matmul& p;
  const float* x;
  int64_t x_stride, n0, columns;
  float* sums;  // [row][stride]
  int64_t stride;
};

// Sums of R rows and C columns, both contiguous along k.
template <class E, int R, int C> static inline void dot(const FewRows& f, int64_t row, int64_t column) {
  const float* x = f.x + row * f.x_stride;
  auto* b = static_cast<const typename E::T*>(f.p.b) + (f.n0 + column) * f.p.b_column;
  int64_t apart = f.p.b_column, k = 0;
  V sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) sums[r][c] = zero();
  auto add = [&](const V* numbers, auto from_x) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      V a = from_x(r);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sums[r][c] = fma(a, numbers[c], sums[r][c]);
    }
  };
  V numbers[C];
  for (; k + V::W <= f.p.k; k += V::W) {
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) numbers[c] = E::load(b + c * apart + k);
    add(numbers, [&](int r) { return load(x + r * f.x_stride + k); });
  }
  if (k < f.p.k) {
    int rest = static_cast<int>(f.p.k - k);
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) numbers[c] = E::load(b + c * apart + k, rest);
    add(numbers, [&](int r) { return load(x + r * f.x_stride + k, rest); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) f.sums[(row + r) * f.stride + column + c] = sum(sums[r][c]);
}

template <class E, int R>
static inline void dot_rows(const FewRows& f, int64_t row, int64_t column, int64_t columns) {
  constexpr int C = R == 1 ? 8 : R == 2 || MANY_REGISTERS ? 4 : 2;
  int64_t c = 0;
  for (; c + C <= columns; c += C) dot<E, R, C>(f, row, column + c);
  for (; c < columns; c++) dot<E, R, 1>(f, row, column + c);
}

// Columns of b are contiguous (b_row is 1). Eight of them at a time stay in L1 for all rows.
template <class E> static void dots(const FewRows& f, int64_t rows) {
  for (int64_t c = 0; c < f.columns; c += 8) {
    int64_t n = f.columns - c < 8 ? f.columns - c : 8, r = 0;
    for (; r + 4 <= rows; r += 4) dot_rows<E, 4>(f, r, c, n);
    if (rows - r == 3) dot_rows<E, 3>(f, r, c, n);
    if (rows - r == 2) dot_rows<E, 2>(f, r, c, n);
    if (rows - r == 1) dot_rows<E, 1>(f, r, c, n);
  }
}

// sums += x[:, k … k + D) b[k … k + D, :] for R rows from `row` on.
template <class E, int R, int D> static inline void add_rows(const FewRows& f, int64_t row, int64_t k) {
  auto* b = static_cast<const typename E::T*>(f.p.b) + k * f.p.b_row + f.n0;
  int64_t apart = f.p.b_row;
  V x[R][D];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) x[r][d] = set1(f.x[(row + r) * f.x_stride + k + d]);
  auto add = [&](int64_t column, auto number) {
    V numbers[D];
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) numbers[d] = number(b + d * apart + column);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      float* to = f.sums + (row + r) * f.stride + column;
      V part = x[r][0] * numbers[0];
#pragma GCC unroll 8
      for (int d = 1; d < D; d++) part = fma(x[r][d], numbers[d], part);
      store(to, load(to) + part);
    }
  };
  int64_t c = 0;
  for (; c + V::W <= f.columns; c += V::W) add(c, [](auto* p) { return E::load(p); });
  if (c < f.columns) add(c, [rest = static_cast<int>(f.columns - c)](auto* p) { return E::load(p, rest); });
}

template <class E, int R> static inline void add_deep(const FewRows& f, int64_t row, int64_t k, int64_t end) {
  constexpr int D = R <= 2 || MANY_REGISTERS ? 4 : 2;
  for (; k + D <= end; k += D) add_rows<E, R, D>(f, row, k);
  for (; k < end; k++) add_rows<E, R, 1>(f, row, k);
}

// Rows of b are contiguous (b_column is 1). Sixteen of them at a time stay in L1 for all rows of x.
template <class E> static void add_all(const FewRows& f, int64_t rows) {
  std::memset(f.sums, 0, rows * f.stride * 4);
  for (int64_t k = 0; k < f.p.k; k += 16) {
    int64_t end = f.p.k - k < 16 ? f.p.k : k + 16, r = 0;
    for (; r + 4 <= rows; r += 4) add_deep<E, 4>(f, r, k, end);
    if (rows - r == 3) add_deep<E, 3>(f, r, k, end);
    if (rows - r == 2) add_deep<E, 2>(f, r, k, end);
    if (rows - r == 1) add_deep<E, 1>(f, r, k, end);
  }
}

// Rows for which these are better than the product in blocks, which first copies b.
constexpr int FEW_DOTS = 16, FEW_SUMS = 8;

static inline bool few_rows(const Matmul& p) {
  return (p.b_row == 1 && p.m <= FEW_DOTS) || (p.b_column == 1 && p.m <= FEW_SUMS);
}

// Columns n0 to n0 + columns of y, by the thread that calls.
static void multiply_few(const Matmul& p, const float* x, int64_t x_stride, int64_t n0, int64_t columns) {
  int64_t stride = (columns + V::W - 1) / V::W * V::W;
  FewRows f{p, x, x_stride, n0, columns, static_cast<float*>(scratch(5, p.m * stride * 4)), stride};
  with(p.type, [&](auto e) {
    using E = decltype(e);
    if (p.b_row == 1) dots<E>(f, p.m);
    else add_all<E>(f, p.m);
  });
  for (int64_t r = 0; r < p.m; r++)
    narrow(p.type, f.sums + r * stride, at(p.y, p.type, r * p.y_stride + n0), columns);
}

}  // namespace qgraph::QGRAPH_ISA
