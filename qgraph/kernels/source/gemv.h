// One row of x times packed weights, with AVX-512: codes become numbers by an OR.
//
// A code q, moved to the right bits, completes the float OFFSET + q. Its products with x are summed, in every lane
// from -OFFSET times the sum of that lane's x on, so that q times x is left. A group's sum is multiplied by its
// scale, and the bias times the sum of the group's x is added. In bfloat16 products are exact and made in pairs
// (AVX512-BF16).
//
// A vector of words holds the codes of several groups, each in lanes of its own.
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

// Words of 16 bits, numbers in bfloat16: 128 + q has q for its last bits.
template <class F> struct InHalves {
  using X = uint16_t;
  static constexpr bool TABLE = std::is_same_v<F, Fp4>;
  static constexpr int WORD = 16, LANES = 2;  // bits of a word, words of a lane of sums
  static __m512i offset() { return _mm512_set1_epi16(TABLE ? 0 : 0x4300); }

  template <int PLACE> static __m512i numbers(__m512i words) {
    if constexpr (PLACE > 0) words = _mm512_srli_epi16(words, PLACE * F::BITS);
    if constexpr (TABLE) return _mm512_permutexvar_epi16(words, _mm512_load_si512(fp4_in_bf16.of));
    const __m512i mask = _mm512_set1_epi16((1 << F::BITS) - 1);
    return _mm512_ternarylogic_epi64(words, mask, offset(), 0xea);  // words & mask | offset
  }
};

// Words of 32 bits, numbers in float: 2^BITS + q has q for the first bits of its fraction.
template <class F> struct InFloats {
  using X = float;
  static constexpr bool TABLE = std::is_same_v<F, Fp4>;
  static constexpr int WORD = 32, LANES = 1;
  static __m512i offset() { return bits(set1(TABLE ? 0 : 1 << F::BITS)).v; }

  template <int PLACE> static __m512i numbers(__m512i words) {
    if constexpr (TABLE)
      return _mm512_castps_si512(F::number({_mm512_srli_epi32(words, PLACE * F::BITS)}).v);
    constexpr int shift = 23 - F::BITS - PLACE * F::BITS;
    words = shift >= 0 ? _mm512_slli_epi32(words, shift < 0 ? 0 : shift) : _mm512_srli_epi32(words, shift < 0 ? -shift : 0);
    const __m512i mask = _mm512_set1_epi32(((1 << F::BITS) - 1) << (23 - F::BITS));
    return _mm512_ternarylogic_epi64(words, mask, offset(), 0xea);
  }
};

// A vector of words of codes F in numbers N, in groups of GROUP.
template <class F, class N, int GROUP> struct CodeBlock {
  static constexpr int CODES = N::WORD / F::BITS;           // of a word
  static constexpr int WORDS = 512 / N::WORD;
  static constexpr int SIZE = WORDS * CODES;                // elements
  static constexpr int LANES = GROUP / CODES / N::LANES;    // of a vector of sums, that belong to one group
  static constexpr int GROUPS = LANES ? V::W / LANES : 0;   // of a vector of sums
  static constexpr bool possible = LANES >= 1 && GROUPS >= 1;

  // `n` numbers of x in the order of the codes, zeros behind: vector v has those for place v of every word.
  static void arrange(const typename N::X* from, typename N::X* to, int64_t n) {
    if constexpr (CODES == 4 && N::WORD == 16) {
      if (n >= SIZE) {  // 64 bits of x for a word
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
    }
    for (int v = 0; v < CODES; v++)
      for (int i = 0; i < WORDS; i++) to[v * WORDS + i] = i * CODES + v < n ? from[i * CODES + v] : 0;
  }
};

// x as the codes want it, zeros to the end of the last block; its sum over every group; and where the sums of
// each block's lanes begin.
template <class X> struct Arranged {
  const X* x;
  const float *sums, *starts;
};

// The functions that may call this must allow the instruction too; nothing else makes the compiler use it.
#define QGRAPH_BF16 target("avx512bf16")
__attribute__((always_inline, QGRAPH_BF16))
static inline V add_products(__m512i numbers, const uint16_t* x, V to) {
  return {_mm512_dpbf16_ps(to.v, (__m512bh)numbers, (__m512bh)_mm512_loadu_si512(x))};
}
__attribute__((always_inline, QGRAPH_BF16))
static inline V add_products(__m512i numbers, const float* x, V to) {
  return fma(V{_mm512_castsi512_ps(numbers)}, load(x), to);
}

template <class F, class N, int GROUP>
__attribute__((QGRAPH_BF16))
static void store_starts(const typename N::X* x, int64_t blocks, float* starts) {
  using B = CodeBlock<F, N, GROUP>;
  for (int64_t b = 0; b < blocks; b++, starts += V::W) {
    V start = zero();
    for (int v = 0; v < B::CODES; v++, x += B::WORDS) start = add_products(N::offset(), x, start);
    store(starts, -start);
  }
}

// Dot products of `count` rows of w from `row` on; scales, biases: of those rows, elements E. One row after the
// other: two at once would be two streams of memory, which is slower than one.
template <class F, class N, int GROUP, class E>
__attribute__((QGRAPH_BF16))
static void dots_of_rows(const Packed& w, const Arranged<typename N::X>& row_of_x, int64_t row, int count,
                         const typename E::T* scales, const typename E::T* biases, float* dots) {
  using B = CodeBlock<F, N, GROUP>;
  const int64_t groups = w.groups();
  const auto* codes = reinterpret_cast<const uint8_t*>(w.words) + row * w.row_bytes();
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i first = _mm512_srli_epi32(lanes, __builtin_ctz(B::LANES));
  for (int r = 0; r < count; r++) {
    const auto* x = row_of_x.x;
    const float* start = row_of_x.starts;
    V total = zero(), offset = zero();

    // A block whose scales `scale` holds from `place` on.
    auto multiply = [&](V scale, __m512i place, __m512i words) __attribute__((always_inline, QGRAPH_BF16)) {
      __builtin_prefetch(codes + AHEAD);
      asm("" : "+v"(words));  // one load: the compiler would read memory again for every shift
      V sums[2] = {load(start), zero()};  // neither waits for the other
      [&]<int... P>(std::integer_sequence<int, P...>) __attribute__((always_inline, QGRAPH_BF16)) {
        ((sums[P % 2] = add_products(N::template numbers<P>(words), x + P * B::WORDS, sums[P % 2])), ...);
      }(std::make_integer_sequence<int, B::CODES>());
      total = fma(V{_mm512_permutexvar_ps(place, scale.v)}, sums[0] + sums[1], total);
      x += B::SIZE, start += V::W;
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
      for (; left >= B::GROUPS; left -= B::GROUPS, codes += 64) {
        multiply(scale, place, _mm512_loadu_si512(codes));
        place = _mm512_add_epi32(place, _mm512_set1_epi32(B::GROUPS));
      }
      if (left) {
        const int words = left * B::LANES;  // of 32 bits
        multiply(scale, place, _mm512_maskz_loadu_epi32(QGRAPH_ISA::first(words), codes));
        codes += 4 * words;
      }
    }
    dots[r] = sum(total + offset);
    scales += groups, biases += groups;
  }
}

// x as floats, or as it is.
static inline const uint16_t* elements(const uint16_t*, const QuantizedMatmul&, const void* x) {
  return static_cast<const uint16_t*>(x);
}
static inline const float* elements(const float*, const QuantizedMatmul& call, const void* x) {
  if (call.x_type == Type::f32) return static_cast<const float*>(x);
  auto* wide = static_cast<float*>(scratch(1, call.k * 4));
  widen(call.x_type, x, wide, call.k);
  return wide;
}
static inline V one_vector(const uint16_t* p) { return load_bf16(p); }
static inline V one_vector(const float* p) { return load(p); }

template <class F, class N, int GROUP> static bool one_row(const QuantizedMatmul& call) {
  using B = CodeBlock<F, N, GROUP>;
  using X = typename N::X;
  const Packed& w = call.w;
  const int64_t k = call.k, groups = w.groups(), padded = (k + B::SIZE - 1) / B::SIZE * B::SIZE;
  const int64_t blocks = padded / B::SIZE;
  auto* x = static_cast<X*>(scratch(0, padded * sizeof(X) + (blocks * V::W + groups) * 4));
  auto* starts = reinterpret_cast<float*>(x + padded);
  auto* sums = starts + blocks * V::W;
  const int64_t x_row = call.x_rows ? call.x_rows[0] : 0, y_row = call.y_rows ? call.y_rows[0] : 0;
  const X* from = elements(static_cast<const X*>(nullptr), call, at(call.x, call.x_type, x_row * call.x_stride));
  V size = zero();
  for (int64_t g = 0; g < groups; g++) {
    V all = zero();
    for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i += V::W) {
      V part = one_vector(from + i);
      all = all + part, size = size + abs(part);
    }
    sums[g] = sum(all);
  }
  if (!(sum(size) < 1e30f)) return false;  // infinities, and sums that could become some, go the usual way
  for (int64_t i = 0; i < padded; i += B::SIZE) B::arrange(from + i, x + i, k - i);
  store_starts<F, N, GROUP>(x, blocks, starts);

  const Arranged<X> row_of_x{x, sums, starts};
  const int64_t bytes = w.row_bytes(), rows = TASK_BYTES / (bytes + 1) + 1;
  parallel((call.n + rows - 1) / rows, double(call.n) * bytes / 15, [&](int64_t task) {
    constexpr int TOGETHER = 16;  // rows whose results are rounded in one go
    using Direct = std::conditional_t<N::WORD == 16, BF16, F32>;
    const bool direct = w.mode == Mode::affine && w.scales_type == (N::WORD == 16 ? Type::bf16 : Type::f32);
    auto* scales = static_cast<float*>(scratch(4, 2 * TOGETHER * groups * 4));
    auto* biases = scales + TOGETHER * groups;
    void* y = at(call.y, call.y_type, y_row * call.y_stride);
    float dots[TOGETHER];
    const int64_t end = (task + 1) * rows < call.n ? (task + 1) * rows : call.n;
    for (int64_t row = task * rows; row < end; row += TOGETHER) {
      const int count = static_cast<int>(end - row < TOGETHER ? end - row : TOGETHER);
      if (direct) {
        using T = typename Direct::T;
        const int64_t skip = row * groups;  // groups of successive rows follow each other
        dots_of_rows<F, N, GROUP, Direct>(w, row_of_x, row, count, static_cast<const T*>(w.scales) + skip,
                                          static_cast<const T*>(w.biases) + skip, dots);
      } else {
        scales_of(w, row, 0, count * groups, scales, biases);
        dots_of_rows<F, N, GROUP, F32>(w, row_of_x, row, count, scales, biases, dots);
      }
      ask_for_scales(w, row + TOGETHER, TOGETHER);
      narrow(call.y_type, dots, at(y, call.y_type, row), count);
    }
  });
  return true;
}

template <class F, class N> static bool one_row(const QuantizedMatmul& call) {
  bool done = false;
  auto with_group = [&]<int GROUP>() {
    if constexpr (CodeBlock<F, N, GROUP>::possible)
      if (call.w.group == GROUP) done = one_row<F, N, GROUP>(call);
  };
  with_group.template operator()<128>();
  with_group.template operator()<64>();
  with_group.template operator()<32>();
  if constexpr (std::is_same_v<F, Fp4>) with_group.template operator()<16>();
  return done;
}

// False where this does not apply.
template <class F> static bool one_row(const QuantizedMatmul& call) {
  if (call.m != 1) return false;
  static const bool pairs = __builtin_cpu_supports("avx512bf16");
  if constexpr (F::BITS == 2 || F::BITS == 4)
    if (pairs && call.x_type == Type::bf16 && one_row<F, InHalves<F>>(call)) return true;
  if constexpr (F::BITS == 2 || F::BITS == 4 || std::is_same_v<F, Affine<8>>) return one_row<F, InFloats<F>>(call);
  return false;
}

#endif

}  // namespace qgraph::QGRAPH_ISA
