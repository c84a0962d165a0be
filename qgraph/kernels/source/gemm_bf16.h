// Many rows of bfloat16 numbers times packed weights, by the CPU's products of bfloat16 pairs (AVX512-BF16).
//
// Codes of few bits are exact in bfloat16, so the products x * q are exact and summed in f32. To lose little by
// cancellation, codes are counted from their middle. For a group of one row of w and one row of x
//
//     sum of x (scale q + bias)  =  scale * (sum of x (q - middle))  +  offset * (sum of x)
//
// with offset = scale * middle + bias. The first sum takes one instruction for two products a lane; scale and
// offset cost two more a group.
//
// A panel is PANEL rows of w as bfloat16 pairs: [k / 2][PANEL][2]. Lanes are rows of w, pairs of x are
// broadcast. Pair p of a word is its code p and the one 16 bits above: a shift and a lookup decode 32 codes.
// Rows of x are put into the same order once. No sum depends on how work is divided.
#pragma once
#include <cstring>
#include <type_traits>

#include "formats.h"
#include "pool.h"

namespace qgraph::QGRAPH_ISA {

#if defined(__AVX512F__)

namespace bf16 {

constexpr int TILE = 6, VECTORS = 2;  // a register block: rows of x, vectors of rows of w
constexpr int PANEL = VECTORS * V::W;
constexpr int DEPTH = 256;  // k of a panel, of 16 KiB: half of L1, again for every tile
constexpr int ROWS = 512;   // of x, that one filling of a panel serves

// Products of pairs do more than FMAs of floats on some CPUs only. AMD's (Zen 4 and later) start one as often
// as an FMA: 234 against 117 GFLOP/s a core were measured. Intel's start one in the time of four: 86 against
// 175 on Emerald Rapids.
static bool pairs_are_fast() {
  static const bool fast = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
  return fast;
}

template <class F> struct Middle {
  static constexpr int OF = 1 << (F::BITS - 1);
};
template <> struct Middle<Fp4> {
  static constexpr int OF = 0;
};

// A format whose words pair up; CODES is of a word.
template <class F> struct Pairs {
  static constexpr int BITS = F::BITS, CODES = 32 / BITS, WORDS = DEPTH / CODES;

  struct Tables {
    alignas(64) uint16_t numbers[32];  // of the low five bits of a place: bits of the next code do not matter
    alignas(64) uint16_t order[32];    // place p of 32 numbers of x holds number order[p]
    constexpr Tables() : numbers(), order() {
      for (int i = 0; i < 32; i++) {
        int code = i & ((1 << BITS) - 1);
        float number = static_cast<float>(code - Middle<F>::OF);
        if constexpr (Middle<F>::OF == 0) number = F::all[code];
        numbers[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, number) >> 16);
        order[i] = static_cast<uint16_t>(i / CODES * CODES + i % CODES / 2 + i % 2 * (CODES / 2));
      }
    }
  };
  static constexpr Tables tables{};

  // The pairs of one word of 16 rows, PANEL apart.
  static inline void decode(__m512i word, uint32_t* to) {
    if constexpr (BITS <= 4) {
      const __m512i numbers = _mm512_load_si512(tables.numbers);
#pragma GCC unroll 8
      for (int p = 0; p < CODES / 2; p++)
        _mm512_storeu_si512(to + p * PANEL,
                            _mm512_permutexvar_epi16(_mm512_srli_epi16(word, p * BITS), numbers));
    } else {  // by way of floats, whose lower halves are zeros
      const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1);
      const V middle = set1(Middle<F>::OF);
#pragma GCC unroll 8
      for (int p = 0; p < CODES / 2; p++) {
        V low = to_float({_mm512_and_si512(_mm512_srli_epi32(word, p * BITS), mask)}) - middle;
        V high = to_float({_mm512_and_si512(_mm512_srli_epi32(word, 16 + p * BITS), mask)}) - middle;
        _mm512_storeu_si512(to + p * PANEL, (bits(high) | shift_right<16>(bits(low))).v);
      }
    }
  }
};

// Rows of x in the order of pairs, and their sums over every group.
struct Rows {
  uint16_t* x;
  float* sums;
  int64_t stride, groups;
};

// False where the row holds infinities, or sums could become some.
template <class F> static bool pack_row(const uint16_t* from, int64_t k, int group, uint16_t* to,
                                         float* sums) {
  const __m512i order = _mm512_load_si512(Pairs<F>::tables.order);
  V size = zero();
  for (int64_t i = 0; i < k; i += group) {
    V all = zero();
    for (int64_t j = i; j < i + group; j += 32) {
      const V low = load_bf16(from + j), high = load_bf16(from + j + 16);
      all = all + (low + high), size = size + (abs(low) + abs(high));
      _mm512_storeu_si512(to + j, _mm512_permutexvar_epi16(order, _mm512_loadu_si512(from + j)));
    }
    *sums++ = sum(all);
  }
  return sum(size) < 1e30f;
}

template <class F> static bool pack_rows(const QuantizedMatmul& p, int64_t row0, int rows, const Rows& to) {
  auto* finite = static_cast<uint8_t*>(scratch(2, rows));
  const int64_t each = 16384 / p.k + 1;
  parallel((rows + each - 1) / each, double(rows) * p.k / 8, [&](int64_t task) {
    for (int64_t r = task * each; r < rows && r < (task + 1) * each; r++) {
      const int64_t row = p.x_rows ? p.x_rows[row0 + r] : row0 + r;
      const auto* x = static_cast<const uint16_t*>(at(p.x, p.x_type, row * p.x_stride));
      finite[r] = pack_row<F>(x, p.k, p.w.group, to.x + r * to.stride, to.sums + r * to.groups);
    }
  });
  return std::memchr(finite, 0, rows) == nullptr;
}

// Words k0 to k1 of `count` rows of w from row n on; zeros in place of the rest of the panel.
template <class F> static void pack_panel(const Packed& w, int64_t n, int count, int64_t k0, int64_t k1,
                                          uint32_t* panel) {
  using P = Pairs<F>;
  const int64_t row_words = w.row_bytes() / 4, words = (k1 - k0) / P::CODES;
  I next[P::WORDS];
  for (int r = 0; r < count && k1 < w.columns; r++)
    for (int64_t i = 0; i < words; i += 16)
      __builtin_prefetch(w.words + (n + r) * row_words + k1 / P::CODES + i);
  for (int side = 0; side < PANEL; side += V::W) {
    const int rows = count - side < V::W ? count - side : V::W;
    transpose(w.words + (n + side) * row_words + k0 / P::CODES, row_words, rows, words, next);
    for (int64_t i = 0; i < words; i++) P::decode(next[i].v, panel + i * P::CODES / 2 * PANEL + side);
  }
}

// The scales and offsets of the panel's rows, [group][PANEL].
template <class F> static void pack_groups(const Packed& w, int64_t n, int count, float* scales,
                                           float* offsets) {
  const int64_t groups = w.groups();
  auto* of_rows = static_cast<float*>(scratch(6, 2 * V::W * groups * 4));
  auto* turned = static_cast<I*>(scratch(7, 2 * groups * sizeof(I)));
  for (int side = 0; side < PANEL; side += V::W) {
    const int rows = count - side < 0 ? 0 : count - side < V::W ? count - side : V::W;
    float* biases = of_rows + rows * groups;
    scales_of(w, n + side, 0, rows * groups, of_rows, biases);  // groups of successive rows follow each other
    transpose(reinterpret_cast<const uint32_t*>(of_rows), groups, rows, groups, turned);
    transpose(reinterpret_cast<const uint32_t*>(biases), groups, rows, groups, turned + groups);
    for (int64_t g = 0; g < groups; g++) {
      const V scale = from_bits(turned[g]), bias = from_bits(turned[groups + g]);
      store(scales + g * PANEL + side, scale);
      store(offsets + g * PANEL + side, fma(scale, set1(Middle<F>::OF), bias));
    }
  }
}

struct Panel {
  const uint32_t* pairs;
  const float *scales, *offsets;
  int64_t groups;
  int group;
};

// R rows of x by a panel; `to` is set, or added to. x, sums: where the panel begins.
template <int R>
__attribute__((target("avx512bf16")))
static void multiply_tile(const Panel& w, const uint16_t* x, int64_t stride, const float* sums,
                          int64_t groups, float* to, bool add) {
  V total[R][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) total[r][v] = add ? load(to + r * PANEL + v * V::W) : zero();
  const uint32_t* pairs = w.pairs;
  for (int64_t g = 0; g < w.groups; g++) {
    __m512 part[R][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) part[r][v] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int i = 0; i < w.group; i += 2, x += 2, pairs += PANEL) {
      __m512i q[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; v++) q[v] = _mm512_loadu_si512(pairs + v * V::W);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        int pair;
        std::memcpy(&pair, x + r * stride, sizeof pair);
        const auto both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) part[r][v] = _mm512_dpbf16_ps(part[r][v], (__m512bh)q[v], both);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
      const V scale = load(w.scales + g * PANEL + v * V::W), offset = load(w.offsets + g * PANEL + v * V::W);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        total[r][v] = fma(V{part[r][v]}, scale, total[r][v]);
        total[r][v] = fma(set1(sums[r * groups + g]), offset, total[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) store(to + r * PANEL + v * V::W, total[r][v]);
}

// The same with rows <= R chosen at run time.
template <int R = TILE>
static inline void multiply_tile(int rows, const Panel& w, const uint16_t* x, int64_t stride,
                                 const float* sums, int64_t groups, float* to, bool add) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_tile<R - 1>(rows, w, x, stride, sums, groups, to, add);
  }
  multiply_tile<R>(w, x, stride, sums, groups, to, add);
}

// Rows begin to end of x, the first being row0 + begin of the product, by `count` rows of w from n on.
template <class F> static void multiply_panel(const QuantizedMatmul& p, const Rows& x, int64_t row0,
                                              int begin, int end, int64_t n, int count) {
  const int64_t groups = x.groups;
  auto* pairs = static_cast<uint32_t*>(scratch(4, (DEPTH / 2 + 2 * groups) * PANEL * 4));
  auto* scales = reinterpret_cast<float*>(pairs + DEPTH / 2 * PANEL);
  float* offsets = scales + groups * PANEL;
  auto* totals = static_cast<float*>(scratch(5, int64_t(end - begin) * PANEL * 4));
  pack_groups<F>(p.w, n, count, scales, offsets);
  const int tiles = (end - begin + TILE - 1) / TILE;
  for (int64_t k0 = 0; k0 < p.k; k0 += DEPTH) {
    const int64_t k1 = p.k - k0 < DEPTH ? p.k : k0 + DEPTH, g0 = k0 / p.w.group;
    pack_panel<F>(p.w, n, count, k0, k1, pairs);
    const Panel panel{pairs, scales + g0 * PANEL, offsets + g0 * PANEL, k1 / p.w.group - g0, p.w.group};
    for (int t = 0; t < tiles; t++) {
      const int r0 = t * (end - begin) / tiles, r1 = (t + 1) * (end - begin) / tiles;  // nearly equal tiles
      const int64_t row = begin + r0;
      multiply_tile(r1 - r0, panel, x.x + row * x.stride + k0, x.stride, x.sums + row * groups + g0, groups,
                    totals + int64_t(r0) * PANEL, k0 > 0);
    }
  }
  for (int r = begin; r < end; r++) {
    const int64_t row = p.y_rows ? p.y_rows[row0 + r] : row0 + r;
    narrow(p.y_type, totals + int64_t(r - begin) * PANEL, at(p.y, p.y_type, row * p.y_stride + n), count);
  }
}

template <class F> static bool many_rows(const QuantizedMatmul& p) {
  const int64_t panels = (p.n + PANEL - 1) / PANEL;
  Rows x{nullptr, nullptr, p.k + 32, p.w.groups()};  // not a power of two: rows would share sets of L1
  for (int64_t row0 = 0; row0 < p.m; row0 += ROWS) {
    const int rows = static_cast<int>(p.m - row0 < ROWS ? p.m - row0 : ROWS);
    x.x = static_cast<uint16_t*>(scratch(0, rows * x.stride * 2));
    x.sums = static_cast<float*>(scratch(1, rows * x.groups * 4));
    if (!pack_rows<F>(p, row0, rows, x)) return false;
    // With few panels the rows are divided too, though each part decodes the panel again.
    int parts = 1;
    while (panels * parts < 8 * threads() && rows / (parts + 1) >= 10 * TILE) parts++;
    parallel(panels * parts, double(p.n) * p.k * (rows / 90.0 + 0.02), [&](int64_t task) {
      const int64_t n = task / parts * PANEL;
      const int part = static_cast<int>(task % parts);
      const int count = static_cast<int>(p.n - n < PANEL ? p.n - n : PANEL);
      multiply_panel<F>(p, x, row0, part * rows / parts, (part + 1) * rows / parts, n, count);
    });
  }
  return true;
}

}  // namespace bf16

// False where this kernel does not apply: the exact products of floats then run, over all rows again.
template <class F> static bool quantized_matmul_bf16(const QuantizedMatmul& p) {
  if constexpr (F::BITS == 2 || F::BITS == 4 || std::is_same_v<F, Affine<8>>) {
    const int group = p.w.group;
    const bool fits = group == 32 || group == 64 || group == 128;
    if (p.x_type == Type::bf16 && p.transpose && fits && p.k > 0 && bf16::pairs_are_fast())
      return bf16::many_rows<F>(p);
  }
  return false;
}

#endif

}  // namespace qgraph::QGRAPH_ISA
