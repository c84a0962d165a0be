// One row of bfloat16 numbers times packed weights, by the CPU's products of bfloat16 pairs (AVX512-BF16).
//
// A code q is the last bits of the bfloat16 number 128 + q: what decodes it is one OR. The products x * (128 + q)
// are exact and summed in f32 as elsewhere, in every lane from -128 times the sum of that lane's x on, so that q
// times x is left. A group's sum is multiplied by its scale, and the bias times the sum of the group's x is added.
// A vector of words holds the codes of several groups, each in lanes of its own.
//
// This rounds sums of 128 times x, which triples the error of the f32 sum: as nothing in bfloat16, but too much
// for x in float.
#pragma once
#include <type_traits>

#include "formats.h"
#include "pool.h"

namespace qgraph::QGRAPH_ISA {

#if defined(__AVX512F__)

struct Fp4InBf16 {
  alignas(64) uint16_t of[32];
  constexpr Fp4InBf16() : of() {  // twice, since a lookup reads five bits
    for (int i = 0; i < 32; i++)
      of[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, Fp4::all[i & 15]) >> 16);
  }
};
static constexpr Fp4InBf16 fp4_in_bf16;

// A vector of words of codes F, in groups of GROUP.
template <class F, int GROUP> struct Bf16Block {
  static constexpr bool TABLE = std::is_same_v<F, Fp4>;
  static constexpr int CODES = 16 / F::BITS;        // of a word
  static constexpr int SIZE = 32 * CODES;           // elements
  static constexpr int LANES = GROUP / CODES / 2;   // of a vector of sums, that belong to one group
  static constexpr int GROUPS = V::W / LANES;       // of a vector of sums

  // The numbers of the codes at one place of every word; only the low bits of a word count.
  static __m512i offset() { return _mm512_set1_epi16(TABLE ? 0 : 0x4300); }
  static __m512i numbers(__m512i words) {
    if constexpr (TABLE) return _mm512_permutexvar_epi16(words, _mm512_load_si512(fp4_in_bf16.of));
    const __m512i mask = _mm512_set1_epi16((1 << F::BITS) - 1);
    return _mm512_ternarylogic_epi64(words, mask, offset(), 0xea);  // words & mask | offset
  }

  // `n` numbers of x in the order of the codes, zeros behind: vector v has those for place v of every word.
  static void arrange(const uint16_t* from, uint16_t* to, int64_t n) {
    if (CODES == 4 && n >= SIZE) {  // 64 bits of x for a word
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        const __m512i four = _mm512_loadu_si512(from + i * 32);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + v * 32 + i * 8),
                           _mm512_cvtepi64_epi16(_mm512_srli_epi64(four, v * 16)));
      }
      return;
    }
    for (int v = 0; v < CODES; v++)
      for (int i = 0; i < 32; i++) to[v * 32 + i] = i * CODES + v < n ? from[i * CODES + v] : 0;
  }

  // Where the sums of every block's lanes begin.
  __attribute__((target("avx512bf16")))
  static void store_starts(const uint16_t* x, int64_t blocks, float* starts) {
    for (int64_t b = 0; b < blocks; b++, starts += V::W) {
      __m512 start = _mm512_setzero_ps();
      for (int v = 0; v < CODES; v++, x += 32)
        start = _mm512_dpbf16_ps(start, (__m512bh)offset(), (__m512bh)_mm512_loadu_si512(x));
      store(starts, -V{start});
    }
  }
};

// x as the codes want it, zeros to the end of the last block; its sum over every group; and the starts.
struct Bf16Row {
  const uint16_t* x;
  const float *sums, *starts;
};

// Dot products of `count` rows of w from `row` on; scales, biases: of those rows, elements E. One row after the
// other: two at once would be two streams of memory, which is slower than one.
template <class F, int GROUP, class E>
__attribute__((target("avx512bf16")))
static void bf16_dots(const Packed& w, const Bf16Row& row_of_x, int64_t row, int count,
                      const typename E::T* scales, const typename E::T* biases, float* dots) {
  using Block = Bf16Block<F, GROUP>;
  const int64_t groups = w.groups();
  const auto* codes = reinterpret_cast<const uint8_t*>(w.words) + row * w.row_bytes();
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i first = _mm512_srli_epi32(lanes, __builtin_ctz(Block::LANES));
  for (int r = 0; r < count; r++) {
    const uint16_t* x = row_of_x.x;
    const float* start = row_of_x.starts;
    V total = zero(), offset = zero();

    // A block whose scales `scale` holds from `place` on.
    auto multiply = [&](V scale, __m512i place, __m512i words)
        __attribute__((always_inline, target("avx512bf16"))) {
      ask_for(codes + AHEAD);
      asm("" : "+v"(words));  // one load: the compiler would read memory again for every shift
      __m512 sum[2] = {load(start).v, _mm512_setzero_ps()};  // neither waits for the other
#pragma GCC unroll 8
      for (int v = 0; v < Block::CODES; v++) {
        const __m512i q = Block::numbers(v ? _mm512_srli_epi16(words, v * F::BITS) : words);
        sum[v % 2] = _mm512_dpbf16_ps(sum[v % 2], (__m512bh)q, (__m512bh)_mm512_loadu_si512(x + v * 32));
      }
      total = fma(V{_mm512_permutexvar_ps(place, scale.v)}, V{sum[0]} + V{sum[1]}, total);
      x += Block::SIZE, start += V::W;
    };
    for (int64_t g = 0; g < groups; g += V::W) {
      const bool whole = groups - g >= V::W;
      const int n = whole ? V::W : static_cast<int>(groups - g);
      const V scale = whole ? E::load(scales + g) : E::load(scales + g, n);
      const V bias = whole ? E::load(biases + g) : E::load(biases + g, n);
      const V of_x = whole ? load(row_of_x.sums + g) : load(row_of_x.sums + g, n);
      offset = fma(bias, of_x, offset);
      __m512i place = first;
      int left = n;
      for (; left >= Block::GROUPS; left -= Block::GROUPS, codes += 64) {
        multiply(scale, place, _mm512_loadu_si512(codes));
        place = _mm512_add_epi32(place, _mm512_set1_epi32(Block::GROUPS));
      }
      if (left) {
        const int words = left * Block::LANES;  // of 32 bits
        multiply(scale, place, _mm512_maskz_loadu_epi32(QGRAPH_ISA::first(words), codes));
        codes += 4 * words;
      }
    }
    dots[r] = sum(total + offset);
    scales += groups, biases += groups;
  }
}

template <class F, int GROUP> static bool dot_product_bf16(const QuantizedMatmul& call) {
  using Block = Bf16Block<F, GROUP>;
  const Packed& w = call.w;
  const int64_t k = call.k, groups = w.groups(), blocks = (k + Block::SIZE - 1) / Block::SIZE;
  auto* x = static_cast<uint16_t*>(scratch(0, blocks * Block::SIZE * 2 + (blocks * V::W + groups) * 4));
  auto* starts = reinterpret_cast<float*>(x + blocks * Block::SIZE);
  auto* sums = starts + blocks * V::W;
  const int64_t x_row = call.x_rows ? call.x_rows[0] : 0, y_row = call.y_rows ? call.y_rows[0] : 0;
  const auto* from = static_cast<const uint16_t*>(at(call.x, call.x_type, x_row * call.x_stride));
  V size = zero();
  for (int64_t g = 0; g < groups; g++) {
    V all = zero();
    for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i += V::W) {
      V part = load_bf16(from + i);
      all = all + part, size = size + abs(part);
    }
    sums[g] = sum(all);
  }
  if (!(sum(size) < 1e30f)) return false;  // infinities, and sums that could become some, go the usual way
  for (int64_t i = 0; i < blocks * Block::SIZE; i += Block::SIZE) Block::arrange(from + i, x + i, k - i);
  Block::store_starts(x, blocks, starts);

  const Bf16Row row_of_x{x, sums, starts};
  const int64_t bytes = w.row_bytes(), rows = TASK_BYTES / (bytes + 1) + 1;
  parallel((call.n + rows - 1) / rows, double(call.n) * bytes / 15, [&](int64_t task) {
    constexpr int TOGETHER = 16;  // rows whose results are rounded in one go
    const bool direct = w.mode == Mode::affine && w.scales_type == Type::bf16;
    auto* scales = static_cast<float*>(scratch(4, 2 * TOGETHER * groups * 4));
    auto* biases = scales + TOGETHER * groups;
    void* y = at(call.y, call.y_type, y_row * call.y_stride);
    float dots[TOGETHER];
    const int64_t end = (task + 1) * rows < call.n ? (task + 1) * rows : call.n;
    for (int64_t row = task * rows; row < end; row += TOGETHER) {
      const int count = static_cast<int>(end - row < TOGETHER ? end - row : TOGETHER);
      if (direct) {
        const int64_t skip = row * groups;  // groups of successive rows follow each other
        bf16_dots<F, GROUP, BF16>(w, row_of_x, row, count, static_cast<const uint16_t*>(w.scales) + skip,
                                  static_cast<const uint16_t*>(w.biases) + skip, dots);
      } else {
        scales_of(w, row, 0, count * groups, scales, biases);
        bf16_dots<F, GROUP, F32>(w, row_of_x, row, count, scales, biases, dots);
      }
      ask_for_scales(w, row + TOGETHER, TOGETHER);
      narrow(call.y_type, dots, at(y, call.y_type, row), count);
    }
  });
  return true;
}

// False where this kernel does not apply.
template <class F> static bool dot_product_bf16(const QuantizedMatmul& call) {
  static const bool able = __builtin_cpu_supports("avx512bf16");
  if (!able || call.m != 1 || call.x_type != Type::bf16) return false;
  if constexpr (F::BITS == 2 || F::BITS == 4) {
    if (call.w.group == 128) return dot_product_bf16<F, 128>(call);
    if (call.w.group == 64) return dot_product_bf16<F, 64>(call);
    if (call.w.group == 32) return dot_product_bf16<F, 32>(call);
  }
  if constexpr (std::is_same_v<F, Fp4>)
    if (call.w.group == 16) return dot_product_bf16<F, 16>(call);
  return false;
}

#endif

}  // namespace qgraph::QGRAPH_ISA
