// One row of bfloat16 numbers times packed weights, by the CPU's products of bfloat16 pairs (AVX512-BF16).
//
// Codes of few bits are exact in bfloat16, so the products x * q are exact and summed in f32 as elsewhere; a
// group's sum is then multiplied by its scale. Half as many instructions as decoding to f32. To lose nothing
// by cancellation, codes are counted from their middle: scale * q + bias is scale * (q - middle) + offset,
// and the offsets meet the sums of x.
#pragma once
#include "formats.h"
#include "pool.h"

namespace qgraph::QGRAPH_ISA {

#if defined(__AVX512F__)

template <class F> struct Middle {
  static constexpr int OF = 1 << (F::BITS - 1);
};
template <> struct Middle<Fp4> {
  static constexpr int OF = 0;
};

template <class F, int SIZE> struct Bf16Unit {
  static constexpr int BITS = F::BITS, WORDS = SIZE * BITS / 16, VECTORS = SIZE / 32;

  // Place p of a unit holds its element order(p); as in Unit, but of 16-bit words.
  static constexpr int order(int p) {
    int vector = p / 32, lane = p % 32;
    return lane % WORDS * (16 / BITS) + lane / WORDS * VECTORS + vector;
  }
  struct Tables {
    alignas(64) uint16_t numbers[32];
    alignas(64) uint16_t shifts[32];
    constexpr Tables() : numbers(), shifts() {
      for (int i = 0; i < 32; i++) {
        int code = i & ((1 << BITS) - 1);
        float number = static_cast<float>(code - Middle<F>::OF);
        if constexpr (Middle<F>::OF == 0) number = F::all[code];
        numbers[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, number) >> 16);
        shifts[i] = static_cast<uint16_t>(i / WORDS * VECTORS * BITS);
      }
    }
  };
  static constexpr Tables tables{};
};

// x as the decoder wants it, and its sum over every group.
struct Bf16Row {
  const uint16_t* x;
  const float* sums;
};

// `count` dot products from row `row` of w on. The lookup reads only the low five bits of a lane, and the
// table repeats: bits of the next codes do not matter.
template <class F, int SIZE>
__attribute__((target("avx512bf16")))
static void bf16_dots(const Packed& w, const Bf16Row& row_of_x, int64_t row, int count, const float* scales,
                      const float* biases, float* dots) {
  using Decoder = Bf16Unit<F, SIZE>;
  const __m512i numbers = _mm512_load_si512(Decoder::tables.numbers);
  const __m512i shifts = _mm512_load_si512(Decoder::tables.shifts);
  const int64_t groups = w.groups();
  const auto* codes = reinterpret_cast<const uint8_t*>(w.words) + row * w.row_bytes();
  for (int r = 0; r < count; r++, scales += groups, biases += groups) {
    V total = zero(), offset = zero();
    const uint16_t* x = row_of_x.x;
    for (int64_t g = 0; g < groups; g++) {
      __m512 sum = _mm512_setzero_ps();
      for (int i = 0; i < w.group; i += SIZE, x += SIZE, codes += SIZE * F::BITS / 8) {
        __builtin_prefetch(codes + AHEAD);
        __m512i words;
        if constexpr (Decoder::WORDS == 16)
          words = _mm512_broadcast_i32x8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
        else if constexpr (Decoder::WORDS == 8)
          words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        else
          words = _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
        words = _mm512_srlv_epi16(words, shifts);
#pragma GCC unroll 2
        for (int v = 0; v < Decoder::VECTORS; v++) {
          __m512i q = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, v * F::BITS), numbers);
          sum = _mm512_dpbf16_ps(sum, (__m512bh)q, (__m512bh)_mm512_loadu_si512(x + v * 32));
        }
      }
      total = fma(set1(scales[g]), V{sum}, total);
    }
    if constexpr (Middle<F>::OF != 0)
      for (int64_t g = 0; g < groups; g += V::W) {
        const int n = static_cast<int>(groups - g < V::W ? groups - g : V::W);
        V middle = fma(load(scales + g, n), set1(Middle<F>::OF), load(biases + g, n));
        offset = fma(middle, load(row_of_x.sums + g, n), offset);
      }
    dots[r] = sum(total + offset);
  }
}

template <class F, int SIZE> static bool dot_product_bf16(const QuantizedMatmul& call) {
  const Packed& w = call.w;
  const int64_t k = call.k, groups = w.groups();
  auto* x = static_cast<uint16_t*>(scratch(0, k * 2 + groups * 4));
  auto* sums = reinterpret_cast<float*>(x + k);
  const int64_t x_row = call.x_rows ? call.x_rows[0] : 0, y_row = call.y_rows ? call.y_rows[0] : 0;
  const auto* from = static_cast<const uint16_t*>(at(call.x, call.x_type, x_row * call.x_stride));
  V size = zero();
  for (int64_t g = 0; g < groups; g++) {
    V all = zero();
    for (int64_t i = g * w.group; i < (g + 1) * w.group; i += V::W) {
      V part = load_bf16(from + i);
      all = all + part, size = size + abs(part);
    }
    sums[g] = sum(all);
  }
  if (!(sum(size) < 1e30f)) return false;  // infinities, and sums that could become some, go the usual way
  for (int64_t i = 0; i < k; i += SIZE)
    for (int p = 0; p < SIZE; p++) x[i + p] = from[i + Bf16Unit<F, SIZE>::order(p)];

  const Bf16Row row_of_x{x, sums};
  const int64_t bytes = w.row_bytes(), rows = TASK_BYTES / (bytes + 1) + 1;
  parallel((call.n + rows - 1) / rows, double(call.n) * bytes / 15, [&](int64_t task) {
    constexpr int TOGETHER = 8;  // rows whose scales are widened in one go
    auto* scales = static_cast<float*>(scratch(4, 2 * TOGETHER * groups * 4));
    auto* biases = scales + TOGETHER * groups;
    void* y = at(call.y, call.y_type, y_row * call.y_stride);
    float dots[TOGETHER];
    const int64_t end = (task + 1) * rows < call.n ? (task + 1) * rows : call.n;
    for (int64_t row = task * rows; row < end; row += TOGETHER) {
      const int count = static_cast<int>(end - row < TOGETHER ? end - row : TOGETHER);
      scales_of(w, row, 0, count * groups, scales, biases);  // groups of successive rows follow each other
      bf16_dots<F, SIZE>(w, row_of_x, row, count, scales, biases, dots);
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
    if (call.w.group >= 64) return dot_product_bf16<F, 64>(call);
    if (call.w.group == 32) return dot_product_bf16<F, 32>(call);
  }
  return false;
}

#endif

}  // namespace qgraph::QGRAPH_ISA
