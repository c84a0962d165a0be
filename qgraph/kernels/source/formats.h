// Packed weights as floats: the formats, and the ways to read them.
//
// A format F (Affine<bits>, Fp4, Fp8) says what a code of F::BITS bits means:
//
//     F::number(codes)                the numbers without their scale (bits above the code are ignored)
//     F::scaled(number, scale, bias)  with it
//     F::rounded(number, scale, bias) the same with every step rounded, as by MLX's ops
//     F::Scale(scale, bias)(codes)    number and scaled, where many codes share a scale
//
// `codes<BITS>(row, k)` reads codes k to k + W of a row, one a lane, k a multiple of W. A Unit decodes some
// more of a row at once, perhaps in another order (lanes along k: products of few rows). `unpack` takes the
// words of W rows, one row a lane (lanes along n: panels of a blocked product).
#pragma once
#include <cstring>
#include <utility>

#include "kernels.h"

namespace qgraph::QGRAPH_ISA {

constexpr int64_t TASK_BYTES = 16384;  // of weights, about, in a task
constexpr int64_t AHEAD = 6144;        // bytes: how far ahead memory is asked for weights

// ---- scales

static inline float e8m0(uint8_t b) {  // 2^(b - 127)
  uint32_t bits = b ? static_cast<uint32_t>(b) << 23 : 0x400000;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Every e4m3 number, made by the compiler.
struct E4M3 {
  float of[256];
  constexpr E4M3() : of() {
    for (int i = 0; i < 256; i++) {
      int exponent = i >> 3 & 15, mantissa = i & 7;
      float f = static_cast<float>(exponent ? 8 + mantissa : mantissa);
      for (int e = exponent ? exponent : 1; e > 10; e--) f *= 2;
      for (int e = exponent ? exponent : 1; e < 10; e++) f /= 2;
      if ((i & 127) == 127) f = __builtin_nanf("");
      of[i] = i & 128 ? -f : f;
    }
  }
};
static constexpr E4M3 e4m3;

// Scales and biases of groups g0 to g1 of a row as floats; there are no biases in the fp modes.
static inline void scales_of(const Packed& w, int64_t row, int64_t g0, int64_t g1, float* scales,
                             float* biases) {
  const int64_t first = row * w.groups() + g0, n = g1 - g0;
  if (w.mode == Mode::affine) {
    widen(w.scales_type, at(w.scales, w.scales_type, first), scales, n);
    return widen(w.scales_type, at(w.biases, w.scales_type, first), biases, n);
  }
  auto* bytes = static_cast<const uint8_t*>(w.scales) + first;
  for (int64_t i = 0; i < n; i++) {
    scales[i] = w.mode == Mode::nvfp4 ? e4m3.of[bytes[i]] * w.global : e8m0(bytes[i]);
    biases[i] = 0;
  }
}

// Ask memory early for what scales_of reads of `count` rows from `row` on.
static inline void ask_for_scales(const Packed& w, int64_t row, int64_t count) {
  const bool affine = w.mode == Mode::affine;
  const int64_t size = affine ? size_of(w.scales_type) : 1, bytes = count * w.groups() * size;
  const int64_t first = row * w.groups() * size;
  for (int64_t i = 0; i < bytes; i += 64) {
    ask_for(static_cast<const char*>(w.scales) + first + i);
    if (affine) ask_for(static_cast<const char*>(w.biases) + first + i);
  }
}

// ---- codes of a row, in order

#if defined(__AVX512F__)
template <int BITS> static inline I codes(const uint8_t* row, int64_t k) {
  const uint8_t* p = row + k / 8 * BITS;
  constexpr __mmask16 used = (1 << 2 * BITS) - 1;  // of 16 bytes
  __m128i packed = _mm_maskz_loadu_epi8(used, p);
  if constexpr (BITS == 8) return {_mm512_cvtepu8_epi32(packed)};
  // Two neighbouring 16-bit words hold a code and are moved to its lane.
  static constexpr auto tables = [] {
    struct {
      alignas(64) uint16_t words[32];
      alignas(64) uint32_t shifts[16];
    } t{};
    for (int i = 0; i < 16; i++) {
      t.words[2 * i] = static_cast<uint16_t>(i * BITS / 16);
      t.words[2 * i + 1] = static_cast<uint16_t>(i * BITS / 16 + 1);
      t.shifts[i] = i * BITS % 16;
    }
    return t;
  }();
  __m512i words = _mm512_permutexvar_epi16(_mm512_load_si512(tables.words), _mm512_castsi128_si512(packed));
  return {_mm512_srlv_epi32(words, _mm512_load_si512(tables.shifts))};
}
#elif defined(__AVX2__)
template <int BITS> static inline I codes(const uint8_t* row, int64_t k) {
  uint64_t packed = 0;
  std::memcpy(&packed, row + k / 8 * BITS, BITS);
  if constexpr (BITS == 8) return {_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(packed)))};
  if constexpr (BITS <= 4) {
    __m256i shifts = _mm256_setr_epi32(0, BITS, 2 * BITS, 3 * BITS, 4 * BITS, 5 * BITS, 6 * BITS, 7 * BITS);
    return {_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(packed)), shifts)};
  }
  // Two neighbouring bytes hold a code and are moved to its lane.
  static constexpr auto tables = [] {
    struct {
      alignas(32) uint32_t bytes[8], shifts[8];
    } t{};
    for (uint32_t i = 0; i < 8; i++) {
      t.bytes[i] = 0x80800000u | (i * BITS / 8 + 1) << 8 | i * BITS / 8;
      t.shifts[i] = i * BITS % 8;
    }
    return t;
  }();
  auto table = [](const uint32_t* of) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(of)); };
  __m256i twice = _mm256_set1_epi64x(static_cast<long long>(packed));
  __m256i pairs = _mm256_shuffle_epi8(twice, table(tables.bytes));
  return {_mm256_srlv_epi32(pairs, table(tables.shifts))};
}
#else
template <int BITS> static inline I codes(const uint8_t* row, int64_t k) {
  static_assert(V::W * BITS <= 64);
  const int first = static_cast<int>(k % 8) * BITS % 8;  // of four lanes, codes may begin inside a byte
  uint64_t packed = 0;
  std::memcpy(&packed, row + k * BITS / 8, (first + V::W * BITS + 7) / 8);
  packed >>= first;
  int32_t lanes[V::W];
  for (int i = 0; i < V::W; i++) lanes[i] = static_cast<int32_t>(packed >> i * BITS & ((1 << BITS) - 1));
  I r;
  std::memcpy(&r, lanes, sizeof r);
  return r;
}
#endif

// ---- formats

// scale * q + bias.
template <int B> struct Affine {
  static constexpr int BITS = B;
  static constexpr int MASK = (1 << B) - 1;

#if defined(__AVX512F__)
  // A permutation looks only at the low four bits of an index (five, of two registers): codes of so few bits
  // become numbers by one lookup, without a mask or a conversion, and the scale goes into the table.
  static V counting(int from) {
    alignas(64) static constexpr auto all = [] {
      struct {
        float of[32];
      } c{};
      for (int i = 0; i < 32; i++) c.of[i] = static_cast<float>(i & MASK);
      return c;
    }();
    return {_mm512_load_ps(all.of + from)};
  }
  struct Scale {
    V low, high;  // the table; or the scale and the bias
    Scale() = default;
    Scale(float scale, float bias) : low(set1(scale)), high(set1(bias)) {
      if constexpr (B <= 5) {
        const V s = low, b = high;
        low = fma(s, counting(0), b);
        if constexpr (B == 5) high = fma(s, counting(16), b);
      }
    }
    V operator()(I c) const {
      if constexpr (B <= 4) return {_mm512_permutexvar_ps(c.v, low.v)};
      if constexpr (B == 5) return {_mm512_permutex2var_ps(low.v, c.v, high.v)};
      return fma(number(c), low, high);
    }
  };
#else
  struct Scale {
    V scale, bias;
    Scale() = default;
    Scale(float s, float b) : scale(set1(s)), bias(set1(b)) {}
    V operator()(I c) const { return fma(number(c), scale, bias); }
  };
#endif

  static V number(I c) {
#if defined(__AVX512F__)
    if constexpr (B <= 4) return {_mm512_permutexvar_ps(c.v, counting(0).v)};
#endif
    return to_float(c & seti(MASK));
  }
  static V scaled(V number, V scale, V bias) { return fma(number, scale, bias); }
  static V rounded(V number, V scale, V bias) { return number * scale + bias; }
};

// A scale without a bias.
template <class F> struct Factor {
  V scale;
  Factor() = default;
  Factor(float s, float) : scale(set1(s)) {}
  V operator()(I c) const { return F::number(c) * scale; }
};

// e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign.
struct Fp4 {
  static constexpr int BITS = 4;
  alignas(64) static constexpr float all[16] = {0,     0.5f,  1,  1.5f,  2,  3,  4,  6,
                                                -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

#if defined(__AVX512F__)
  static V number(I c) { return {_mm512_permutexvar_ps(c.v, load(all).v)}; }
  struct Scale {
    V table;
    Scale() = default;
    Scale(float scale, float) : table(set1(scale) * load(all)) {}
    V operator()(I c) const { return {_mm512_permutexvar_ps(c.v, table.v)}; }
  };
#else
  static V number(I c) {
#if defined(__AVX2__)
    V magnitude = {_mm256_permutevar8x32_ps(load(all).v, c.v)};
    return from_bits(bits(magnitude) | shift_left<28>(c & seti(8)));
#else
    int32_t lanes[V::W];
    float numbers[V::W];
    std::memcpy(lanes, &c, sizeof lanes);
    for (int i = 0; i < V::W; i++) numbers[i] = all[lanes[i] & 15];
    return load(numbers);
#endif
  }
  using Scale = Factor<Fp4>;
#endif
  static V scaled(V number, V scale, V) { return number * scale; }
  static V rounded(V number, V scale, V) { return number * scale; }
};

// e4m3, with a NaN and no infinity.
struct Fp8 {
  static constexpr int BITS = 8;
  using Scale = Factor<Fp8>;

  static V number(I c) {
    I magnitude = c & seti(127);
    V tiny = to_float(magnitude) * set1(0x1p-9f);
    V usual = from_bits(shift_left<20>(magnitude) + seti(120 << 23));
    V r = select(tiny < set1(8 * 0x1p-9f), tiny, usual);
    r = select(tiny == set1(127 * 0x1p-9f), set1(__builtin_nanf("")), r);
    return from_bits(bits(r) | shift_left<24>(c & seti(128)));
  }
  static V scaled(V number, V scale, V) { return number * scale; }
  static V rounded(V number, V scale, V) { return number * scale; }
};

// f(F{}) with the format F of `w`.
template <class Function> static inline void with_format(const Packed& w, const Function& f) {
  if (w.mode == Mode::mxfp8) return f(Fp8{});
  if (w.mode != Mode::affine) return f(Fp4{});
  switch (w.bits) {
    case 1: return f(Affine<1>{});
    case 2: return f(Affine<2>{});
    case 3: return f(Affine<3>{});
    case 4: return f(Affine<4>{});
    case 5: return f(Affine<5>{});
    case 6: return f(Affine<6>{});
    default: return f(Affine<8>{});
  }
}

// ---- units: SIZE weights of a row that share a scale, as SIZE / W vectors

// Place p of a unit holds its element order(p).
template <class F, int SIZE> struct Unit {
  static constexpr int VECTORS = SIZE / V::W;
  static constexpr int order(int p) { return p; }
  static void decode(const uint8_t* row, int64_t k, const typename F::Scale& scale, V* to) {
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; i++) to[i] = scale(codes<F::BITS>(row, k + i * V::W));
  }
};

#if defined(__AVX512F__)
// Two and four bits need only shifts: the words of the unit repeat through the register, and every repetition
// is shifted to other codes.
template <class F, int SIZE>
  requires(F::BITS == 2 || F::BITS == 4)
struct Unit<F, SIZE> {
  static constexpr int VECTORS = SIZE / 16, BITS = F::BITS, WORDS = SIZE * BITS / 32;
  static constexpr int order(int p) {
    int vector = p / 16, lane = p % 16;
    return lane % WORDS * (32 / BITS) + lane / WORDS * VECTORS + vector;
  }
  static void decode(const uint8_t* row, int64_t k, const typename F::Scale& scale, V* to) {
    alignas(64) static constexpr auto shifts = [] {
      struct {
        uint32_t of[16];
      } s{};
      for (int i = 0; i < 16; i++) s.of[i] = i / WORDS * VECTORS * BITS;
      return s;
    }();
    const uint8_t* p = row + k / 8 * BITS;
    __m512i words;
    if constexpr (WORDS == 2) {
      long long pair;
      std::memcpy(&pair, p, 8);
      words = _mm512_set1_epi64(pair);
    } else if constexpr (WORDS == 4) {
      words = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    } else {
      static_assert(WORDS == 8);
      words = _mm512_broadcast_i32x8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    I first = {_mm512_srlv_epi32(words, _mm512_load_si512(shifts.of))};
    to[0] = scale(first);
    if constexpr (VECTORS > 1) to[1] = scale(shift_right<BITS>(first));
    if constexpr (VECTORS > 2) to[2] = scale(shift_right<2 * BITS>(first));
    if constexpr (VECTORS > 2) to[3] = scale(shift_right<3 * BITS>(first));
  }
};

// e4m3 by way of f16, which has the same digits and more exponents.
template <int SIZE> struct Unit<Fp8, SIZE> {
  static constexpr int VECTORS = SIZE / 16;
  static constexpr int order(int p) { return p; }
  static void decode(const uint8_t* row, int64_t k, const Fp8::Scale& scale, V* to) {
    const V nans = set1(__builtin_nanf("")), more = set1(256);  // exponents of f16 count from 15, not from 7
    const __m256i ones = _mm256_set1_epi16(-1), high = _mm256_set1_epi16(-128);
#pragma GCC unroll 16
    for (int i = 0; i < VECTORS; i++) {
      __m256i c = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k + 16 * i)));
      __mmask16 number = _mm256_cmpneq_epi16_mask(_mm256_or_si256(c, high), ones);
      __m512 half = _mm512_cvtph_ps(_mm256_and_si256(_mm256_slli_epi16(c, 7), _mm256_set1_epi16(-0x4080)));
      to[i] = V{_mm512_mask_mul_ps(nans.v, number, half, more.v)} * scale.scale;
    }
  }
};
#endif

// ---- words of W rows, one row a lane

// to[j] = the j-th word of every row, row i in lane i; zeros in the lanes from `rows` on.
static inline void transpose(const uint32_t* from, int64_t stride, int rows, int64_t n, I* to) {
  int64_t j = 0;
#if defined(__AVX512F__)
  for (; j < n; j += 16) {
    const __mmask16 mask = first(static_cast<int>(n - j < 16 ? n - j : 16));
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
      r[i] = i < rows ? _mm512_maskz_loadu_epi32(mask, from + i * stride + j) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
      r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
      r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
    for (int i = 0; i < 16 && j + i < n; i++) to[j + i] = {r[i]};
  }
#endif
  for (; j < n; j++) {
    uint32_t lanes[V::W] = {};
    for (int i = 0; i < rows; i++) lanes[i] = from[i * stride + j];
    std::memcpy(&to[j], lanes, sizeof lanes);
  }
}

// The smallest number of codes that fill whole words.
template <int BITS> constexpr int CODES = BITS == 2 || BITS == 6 ? 16 : BITS == 4 ? 8 : BITS == 8 ? 4 : 32;

template <int BITS, int J> static inline I code(const I* words) {
  constexpr int word = J * BITS / 32, shift = J * BITS % 32;
  I r = shift_right<shift>(words[word]);
  if constexpr (shift + BITS > 32) r = r | shift_left<32 - shift>(words[word + 1]);
  return r;
}

// f(j, code j) for the CODES<BITS> codes in `words`.
template <int BITS, class Function> static inline void unpack(const I* words, const Function& f) {
  [&]<int... J>(std::integer_sequence<int, J...>) {
    (f(J, code<BITS, J>(words)), ...);
  }(std::make_integer_sequence<int, CODES<BITS>>());
}

}  // namespace qgraph::QGRAPH_ISA
