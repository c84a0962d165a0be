// Products with packed weights, exact: weights are decoded to floats and summed in f32.
//
// Few rows of x: dot products along the rows of w, every decoded vector used for all of them (dot_rows). More
// rows, or w not transposed: the blocked product of gemm.h over decoded panels (PackedRows, PackedColumns).
#pragma once
#include "formats.h"
#include "gemm.h"
#include "gemm_bf16.h"
#include "gemv_bf16.h"
#include "int8.h"

namespace qgraph::QGRAPH_ISA {

// ---- few rows

// Rows of x at most that take dot products.
#if defined(__AVX2__) || defined(__ARM_NEON)
constexpr int FEW = 5;
#else
constexpr int FEW = 1;
#endif

// Rows of w at a time: two share the loads of x, where those are many.
constexpr int rows_at_once(int m) { return m <= 2 ? 1 : 2; }

// x: m rows of k floats, each unit in the order of its decoder.
struct Dot {
  const QuantizedMatmul& call;
  const float* x;
};

template <int M> static inline void store_dots(const QuantizedMatmul& call, int64_t row, const float* dots) {
  with(call.y_type, [&](auto e) {
    using E = decltype(e);
    for (int m = 0; m < M; m++) {
      auto* y = static_cast<typename E::T*>(call.y) + (call.y_rows ? call.y_rows[m] : m) * call.y_stride;
      E::store(y + row, set1(dots[m]), 1);
    }
  });
}

// Dot products of all M rows of x with `count` <= N rows of w from `row` on. scales, biases: of those rows.
template <class F, int SIZE, int M, int N>
static inline void dot_rows(const Dot& dot, int64_t row, int count, const float* scales,
                            const float* biases) {
  using Decoder = Unit<F, SIZE>;
  const Packed& w = dot.call.w;
  const int64_t k = dot.call.k, groups = w.groups(), bytes = w.row_bytes();
  const auto* codes = reinterpret_cast<const uint8_t*>(w.words) + row * bytes;
  int64_t step[N];  // from the first row; a row that is missing is the first again, and not stored
  for (int r = 0; r < N; r++) step[r] = r < count ? r : 0;

  constexpr int CHAINS = M * N == 1 ? 4 : M * N <= 8 ? 2 : 1;  // sums that do not wait for each other
  V sums[N][M][CHAINS];
  for (auto& of_row : sums)
    for (auto& of_x : of_row)
      for (V& sum : of_x) sum = zero();
  for (int64_t g = 0; g < groups; g++) {
    typename F::Scale scale[N];
#pragma GCC unroll 2
    for (int r = 0; r < N; r++) scale[r] = {scales[step[r] * groups + g], biases[step[r] * groups + g]};
    for (int64_t i = g * w.group; i < (g + 1) * w.group; i += SIZE) {
      V decoded[N][Decoder::VECTORS];
#pragma GCC unroll 2
      for (int r = 0; r < N; r++) {
        ask_for(codes + step[r] * bytes + i / 8 * F::BITS + AHEAD);
        Decoder::decode(codes + step[r] * bytes, i, scale[r], decoded[r]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int v = 0; v < Decoder::VECTORS; v++) {
          V x = load(dot.x + m * k + i + v * V::W);
#pragma GCC unroll 2
          for (int r = 0; r < N; r++) {
            V& sum = sums[r][m][v % CHAINS];
            sum = fma(decoded[r][v], x, sum);
          }
        }
    }
  }
  for (int r = 0; r < count; r++) {
    float dots[M];
    for (int m = 0; m < M; m++) {
      V all = sums[r][m][0];
      for (int c = 1; c < CHAINS; c++) all = all + sums[r][m][c];
      dots[m] = sum(all);
    }
    store_dots<M>(dot.call, row + r, dots);
  }
}

template <class F, int SIZE, int M> static void dot_block(const Dot& dot, int64_t row, int64_t end) {
  constexpr int N = rows_at_once(M), TOGETHER = 8;  // rows whose scales are widened in one go
  const Packed& w = dot.call.w;
  const int64_t groups = w.groups();
  auto* scales = static_cast<float*>(scratch(4, 2 * TOGETHER * groups * 4));
  auto* biases = scales + TOGETHER * groups;
  for (; row < end; row += TOGETHER) {
    const int count = static_cast<int>(end - row < TOGETHER ? end - row : TOGETHER);
    scales_of(w, row, 0, count * groups, scales, biases);  // the groups of successive rows follow each other
    ask_for_scales(w, row + TOGETHER, TOGETHER);
    for (int r = 0; r < count; r += N) {
      const int left = count - r;
      dot_rows<F, SIZE, M, N>(dot, row + r, left < N ? left : N, scales + r * groups, biases + r * groups);
    }
  }
}

// The same with m <= M chosen at run time.
template <class F, int SIZE, int M> static inline void dot_blocks(const Dot& dot, int64_t row, int64_t end) {
  if constexpr (M > 1) {
    if (dot.call.m < M) return dot_blocks<F, SIZE, M - 1>(dot, row, end);
  }
  dot_block<F, SIZE, M>(dot, row, end);
}

template <class F, int SIZE> static void dot_product(const QuantizedMatmul& call) {
  auto* x = static_cast<float*>(scratch(0, (call.m + 1) * call.k * 4));
  float* row = x + call.m * call.k;
  for (int64_t m = 0; m < call.m; m++) {
    const int64_t from = (call.x_rows ? call.x_rows[m] : m) * call.x_stride;
    widen(call.x_type, at(call.x, call.x_type, from), row, call.k);
    for (int64_t i = 0; i < call.k; i += SIZE)
      for (int p = 0; p < SIZE; p++) x[m * call.k + i + p] = row[i + Unit<F, SIZE>::order(p)];
  }
  const Dot dot{call, x};
  const int64_t bytes = call.w.row_bytes(), rows = (TASK_BYTES / (bytes + 1) + 2) / 2 * 2;
  const double work = double(call.n) * (bytes / 10.0 + 2.0 * call.m * call.k / FLOPS);
  parallel((call.n + rows - 1) / rows, work, [&](int64_t task) {
    const int64_t from = task * rows, end = from + rows < call.n ? from + rows : call.n;
    dot_blocks<F, SIZE, FEW>(dot, from, end);
  });
}

// With the unit that suits the format and the group.
template <class F> static void dot_product(const QuantizedMatmul& call) {
#if defined(__AVX512F__)
  if (dot_product_bf16<F>(call)) return;
#endif
  if constexpr (F::BITS == 4)
    if (call.w.group == 16) return dot_product<F, 16>(call);
#if defined(__AVX512F__)
  if constexpr (F::BITS == 2 || F::BITS == 4)
    if (call.w.group >= 64) return dot_product<F, 64>(call);
#endif
  return dot_product<F, 32>(call);
}

// ---- panels for the blocked product

// Rows of w are columns of the product: W rows at a time, one a lane.
template <class F> struct PackedRows {
  const Packed& w;

  void operator()(int64_t n0, int columns, int64_t k0, int64_t k1, float* panel) const {
    for (int c = 0; c < columns; c += V::W)
      fill(n0 + c, columns - c < V::W ? columns - c : V::W, k0, k1, panel + c);
  }

  void fill(int64_t row, int rows, int64_t k0, int64_t k1, float* to) const {
    constexpr int AT_ONCE = CODES<F::BITS>, WORDS = AT_ONCE * F::BITS / 32;
    I words[DEPTH * F::BITS / 32];
    const int64_t row_words = w.row_bytes() / 4;
    const uint32_t* from = w.words + row * row_words + k0 * F::BITS / 32;
    transpose(from, row_words, rows, (k1 - k0) * F::BITS / 32, words);

    const int64_t g0 = k0 / w.group, groups = k1 / w.group - g0;
    constexpr int MOST = DEPTH / 16;  // groups of a panel
    float scales[MOST][V::W], biases[MOST][V::W], of_row[2][MOST] = {};
    for (int r = 0; r < V::W; r++) {
      if (r < rows) scales_of(w, row + r, g0, g0 + groups, of_row[0], of_row[1]);
      for (int64_t g = 0; g < groups; g++) {
        scales[g][r] = r < rows ? of_row[0][g] : 0;
        biases[g][r] = r < rows ? of_row[1][g] : 0;
      }
    }

    const I* next = words;
    for (int64_t g = 0; g < groups; g++) {
      const V scale = load(scales[g]), bias = load(biases[g]);
      for (int k = 0; k < w.group; k += AT_ONCE, next += WORDS, to += AT_ONCE * LANES)
        unpack<F::BITS>(next, [&](int j, I c) {
          store(to + j * LANES, F::scaled(F::number(c), scale, bias));
        });
    }
  }
};

// Rows of w are the k of the product: W neighbouring numbers of a row, one a lane.
template <class F> struct PackedColumns {
  const Packed& w;

  void operator()(int64_t n0, int columns, int64_t k0, int64_t k1, float* panel) const {
    const int64_t g0 = n0 / w.group, g1 = (n0 + columns + w.group - 1) / w.group;
    float scales[LANES], biases[LANES];  // groups are at least 16 wide
    for (int64_t k = k0; k < k1; k++, panel += LANES) {
      const auto* row = reinterpret_cast<const uint8_t*>(w.words) + k * w.row_bytes();
      scales_of(w, k, g0, g1, scales, biases);
      for (int c = 0; c < columns; c += V::W) {
        const int64_t g = (n0 + c) / w.group - g0;
        store(panel + c, typename F::Scale(scales[g], biases[g])(codes<F::BITS>(row, n0 + c)));
      }
    }
  }
};

static void quantized_matmul(const QuantizedMatmul& call) {
  if (call.int8 && call.transpose && quantized_matmul_int8(call)) return;
  with_format(call.w, [&](auto format) {
    using F = decltype(format);
    if (call.transpose && call.m <= FEW) return dot_product<F>(call);
#if defined(__AVX512F__)
    if (quantized_matmul_bf16<F>(call)) return;
#endif
    const Product p{call.x,      call.x_type,   call.x_stride, 1,      call.x_rows, call.y,
                    call.y_type, call.y_stride, call.y_rows,   call.m, call.n,      call.k};
    if (call.transpose) return gemm(p, PackedRows<F>{call.w});
    return gemm(p, PackedColumns<F>{call.w});
  });
}

// ---- rows as numbers: to the bit what mx.dequantize gives in f32, where 0 is 0 and not a rest of fma

template <class F> static void dequantize_row(const Packed& w, int64_t row, void* y, Type type) {
  auto* scales = static_cast<float*>(scratch(4, 2 * w.groups() * 4));
  float* biases = scales + w.groups();
  scales_of(w, row, 0, w.groups(), scales, biases);
  const auto* words = reinterpret_cast<const uint8_t*>(w.words) + row * w.row_bytes();
  float numbers[128];
  for (int64_t g = 0; g < w.groups(); g++) {
    const V scale = set1(scales[g]), bias = set1(biases[g]);
    for (int k = 0; k < w.group; k += V::W)
      store(numbers + k, F::rounded(F::number(codes<F::BITS>(words, g * w.group + k)), scale, bias));
    narrow(type, numbers, at(y, type, g * w.group), w.group);
  }
}

static void dequantize(const Dequantize& call) {
  const int64_t columns = call.w.columns, rows = (TASK_BYTES + columns - 1) / columns;
  with_format(call.w, [&](auto format) {
    using F = decltype(format);
    parallel((call.count + rows - 1) / rows, double(call.count) * columns / 2, [&](int64_t task) {
      const int64_t end = (task + 1) * rows < call.count ? (task + 1) * rows : call.count;
      for (int64_t i = task * rows; i < end; i++) {
        const int64_t row = call.indices ? call.indices[i] : i;
        dequantize_row<F>(call.w, row, at(call.y, call.y_type, i * columns), call.y_type);
      }
    });
  });
}

}  // namespace qgraph::QGRAPH_ISA
