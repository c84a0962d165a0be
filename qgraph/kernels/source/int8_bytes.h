// Vectors of bytes beside V, four bytes a lane: what the int8 products are made of.
//
// Weights are unsigned, activations signed within -127..127. Every instruction set computes the exact sums.
#pragma once
#include <cstring>

#include "kernels.h"

namespace qgraph::QGRAPH_ISA::int8 {

#if defined(__AVX512F__)

struct Bytes {
  __m512i v;
  static constexpr int W = 64;
};

static inline Bytes load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }
static inline Bytes load_bytes(const void* p, int n) {  // the first n, zeros for the rest
  return {_mm512_maskz_loadu_epi8(n >= 64 ? ~__mmask64(0) : (__mmask64(1) << n) - 1, p)};
}
static inline Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
static inline Bytes high_nibbles(Bytes a) { return low_nibbles({_mm512_srli_epi16(a.v, 4)}); }
// The nibbles of n bytes, n <= W / 2, in order; zeros for the rest.
static inline Bytes nibbles(const uint8_t* p, int n) {
  __m512i words = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(n >= 32 ? ~__mmask32(0) : (1u << n) - 1, p));
  return low_nibbles({_mm512_or_si512(words, _mm512_slli_epi16(words, 4))});
}
// Four bytes, the same in every lane.
static inline Bytes quad(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm512_set1_epi32(four)};
}
// 2 W bytes parted: those at even places, then those at odd ones.
static inline void part(const int8_t* from, int8_t* to) {
  for (int i = 0; i < 2; i++) {
    __m512i words = _mm512_loadu_si512(from + 64 * i);
    __m256i even = _mm512_cvtepi16_epi8(words), odd = _mm512_cvtepi16_epi8(_mm512_srli_epi16(words, 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * i), even);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 + 32 * i), odd);
  }
}
// Integers within -128..127 as bytes.
static inline void store_as_bytes(int8_t* p, I a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
// The vectors, one after the other, in which every element of another stands Run times.
template <int Run> struct Spread {
  __m512i element = _mm512_srli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                      Run == 16 ? 4 : Run == 8 ? 3 : Run == 4 ? 2 : 1);
  V of(V c) const { return {_mm512_permutexvar_ps(element, c.v)}; }
  void next() { element = _mm512_add_epi32(element, _mm512_set1_epi32(16 / Run)); }
};
__attribute__((always_inline)) static inline void transpose(I* r) {  // W vectors of W integers
  __m512i t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_epi32(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m512i a = _mm512_shuffle_i32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_i32x4(u[i], u[i + 4], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0x88);
    __m512i d = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0xdd);
    r[i].v = _mm512_shuffle_i32x4(a, c, 0x88);
    r[i + 4].v = _mm512_shuffle_i32x4(b, d, 0x88);
    r[i + 8].v = _mm512_shuffle_i32x4(a, c, 0xdd);
    r[i + 12].v = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
}

#elif defined(__AVX2__)

struct Bytes {
  __m256i v;
  static constexpr int W = 32;
};

static inline Bytes load_bytes(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
static inline Bytes load_bytes(const void* p, int n) {
  uint8_t bytes[32] = {};
  std::memcpy(bytes, p, n < 32 ? n : 32);
  return load_bytes(bytes);
}
static inline Bytes low_nibbles(Bytes a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(15))}; }
static inline Bytes high_nibbles(Bytes a) { return low_nibbles({_mm256_srli_epi16(a.v, 4)}); }
static inline Bytes nibbles(const uint8_t* p, int n) {
  uint8_t bytes[16] = {};
  if (n < 16) std::memcpy(bytes, p, n);
  __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(n < 16 ? bytes : p)));
  return low_nibbles({_mm256_or_si256(words, _mm256_slli_epi16(words, 4))});
}
static inline Bytes quad(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return {_mm256_set1_epi32(four)};
}
static inline void part(const int8_t* from, int8_t* to) {
  __m256i low = _mm256_set1_epi16(255), a = load_bytes(from).v, b = load_bytes(from + 32).v;
  __m256i even = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
  __m256i odd = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(even, 0xd8));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), _mm256_permute4x64_epi64(odd, 0xd8));
}
static inline void store_as_bytes(int8_t* p, I a) {
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
template <int Run> struct Spread {  // for Run = 16 an element is that of two vectors
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  V of(V c) const {
    __m256i element = _mm256_srli_epi32(lane, Run == 16 ? 4 : Run == 8 ? 3 : Run == 4 ? 2 : 1);
    return {_mm256_permutevar8x32_ps(c.v, element)};
  }
  void next() { lane = _mm256_add_epi32(lane, _mm256_set1_epi32(8)); }
};
__attribute__((always_inline)) static inline void transpose(I* r) {
  __m256i t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_epi32(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    r[i].v = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}

#else

struct Bytes {
  static constexpr int W = 4 * V::W;
  uint8_t v[W];
};

static inline Bytes load_bytes(const void* p) {
  Bytes r;
  std::memcpy(r.v, p, Bytes::W);
  return r;
}
static inline Bytes load_bytes(const void* p, int n) {
  Bytes r = {};
  std::memcpy(r.v, p, n < Bytes::W ? n : Bytes::W);
  return r;
}
static inline Bytes low_nibbles(Bytes a) {
  for (auto& b : a.v) b &= 15;
  return a;
}
static inline Bytes high_nibbles(Bytes a) {
  for (auto& b : a.v) b >>= 4;
  return a;
}
static inline Bytes nibbles(const uint8_t* p, int n) {
  Bytes r = {};
  for (int i = 0; i < Bytes::W / 2 && i < n; i++) r.v[2 * i] = p[i] & 15, r.v[2 * i + 1] = p[i] >> 4;
  return r;
}
static inline Bytes quad(const int8_t* p) {
  Bytes r;
  for (int i = 0; i < Bytes::W; i += 4) std::memcpy(r.v + i, p, 4);
  return r;
}
static inline void part(const int8_t* from, int8_t* to) {
  for (int i = 0; i < Bytes::W; i++) to[i] = from[2 * i], to[Bytes::W + i] = from[2 * i + 1];
}
static inline void store_as_bytes(int8_t* p, I a) {
  int32_t lanes[V::W];
  std::memcpy(lanes, &a, sizeof lanes);
  for (int i = 0; i < V::W; i++) p[i] = static_cast<int8_t>(lanes[i]);
}
template <int Run> struct Spread {
  int lane = 0;
  V of(V c) const {
    float from[V::W], to[V::W];
    store(from, c);
    for (int l = 0; l < V::W; l++) to[l] = from[(lane + l) / Run];
    return load(to);
  }
  void next() { lane += V::W; }
};
__attribute__((always_inline)) static inline void transpose(I* r) {
  static_assert(sizeof(I) == 4 * V::W);
  int32_t lanes[V::W][V::W], turned[V::W][V::W];
  std::memcpy(lanes, r, sizeof lanes);
  for (int i = 0; i < V::W; i++)
    for (int j = 0; j < V::W; j++) turned[i][j] = lanes[j][i];
  std::memcpy(r, turned, sizeof turned);
}

#endif

// Sums of products of weights of at most `Bits` (4 or 8) bits and activations, four a lane. clear() comes
// first; after at most eight add() comes a fold(), then `total` holds all so far. (With a constructor GCC
// would keep an array of these in memory.)
#if defined(__AVX512VNNI__)

template <int Bits> struct Dots {
  I total;
  void clear() { total = seti(0); }
  void add(Bytes w, Bytes x) { total.v = _mm512_dpbusd_epi32(total.v, w.v, x.v); }
  void fold() {}
};

#elif defined(__AVX512F__) || defined(__AVX2__)

// maddubs adds two products in 16 bits and saturates: of 2 * 15 * 127 eight fit, 2 * 255 * 127 does not, so
// that a byte goes in two nibbles.
#if defined(__AVX512F__)
using Words = __m512i;
static inline Words pairs(Bytes w, Bytes x) { return _mm512_maddubs_epi16(w.v, x.v); }
static inline Words add_words(Words a, Words b) { return _mm512_add_epi16(a, b); }
static inline Words none() { return _mm512_setzero_si512(); }
static inline I add_pairs(I total, Words a, short factor) {
  return total + I{_mm512_madd_epi16(a, _mm512_set1_epi16(factor))};
}
#else
using Words = __m256i;
static inline Words pairs(Bytes w, Bytes x) { return _mm256_maddubs_epi16(w.v, x.v); }
static inline Words add_words(Words a, Words b) { return _mm256_add_epi16(a, b); }
static inline Words none() { return _mm256_setzero_si256(); }
static inline I add_pairs(I total, Words a, short factor) {
  return total + I{_mm256_madd_epi16(a, _mm256_set1_epi16(factor))};
}
#endif

template <int Bits> struct Dots {
  I total;
  Words low, high;
  void clear() { total = seti(0), low = high = none(); }
  void add(Bytes w, Bytes x) {
    low = add_words(low, pairs(Bits == 4 ? w : low_nibbles(w), x));
    if constexpr (Bits == 8) high = add_words(high, pairs(high_nibbles(w), x));
  }
  void fold() {
    total = add_pairs(total, low, 1), low = none();
    if constexpr (Bits == 8) total = add_pairs(total, high, 16), high = none();
  }
};

#elif defined(__ARM_FEATURE_DOTPROD)

// sdot takes both sides as signed, so the top bit of a byte goes on its own.
template <int Bits> struct Dots {
  I total;
  int32x4_t sums[V::W / 4];
  void clear() {
    total = seti(0);
    for (auto& sum : sums) sum = vdupq_n_s32(0);
  }
  void add(Bytes w, Bytes x) {
    for (int i = 0; i < V::W / 4; i++) {
      uint8x16_t a = vld1q_u8(w.v + 16 * i);
      int8x16_t b = vreinterpretq_s8_u8(vld1q_u8(x.v + 16 * i));
      if constexpr (Bits == 8) {
        int32x4_t top = vdotq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(vshrq_n_u8(a, 7)), b);
        sums[i] = vaddq_s32(sums[i], vshlq_n_s32(top, 7));
        a = vandq_u8(a, vdupq_n_u8(127));
      }
      sums[i] = vdotq_s32(sums[i], vreinterpretq_s8_u8(a), b);
    }
  }
  void fold() { std::memcpy(&total, sums, sizeof total); }
};

#else

template <int Bits> struct Dots {
  I total;
  int32_t sums[V::W];
  void clear() {
    total = seti(0);
    for (auto& sum : sums) sum = 0;
  }
  void add(Bytes w, Bytes x) {
    int8_t signs[Bytes::W];
    std::memcpy(signs, x.v, Bytes::W);
    for (int i = 0; i < V::W; i++)
      for (int j = 0; j < 4; j++) sums[i] += w.v[4 * i + j] * signs[4 * i + j];
  }
  void fold() { std::memcpy(&total, sums, sizeof total); }
};

#endif

// n weights (a multiple of 32) of Bits bits as bytes. Eight of them stand in Bits bytes and are spread by
// halving: four and four, two and two, one and one.
template <int Bits> static inline void unpack(const uint8_t* p, uint8_t* to, int64_t n) {
  constexpr uint64_t four = (1ull << 4 * Bits) - 1, two = ((1ull << 2 * Bits) - 1) * 0x100000001;
  constexpr uint64_t one = ((1ull << Bits) - 1) * 0x1000100010001;
  for (int64_t i = 0; i < n; i += 8, p += Bits) {
    // Two loads: one of Bits bytes goes through memory, and one of eight would pass the end of the weights.
    constexpr int first = Bits < 4 ? 2 : 4, rest = Bits - first;
    uint32_t low = 0;
    uint16_t high = 0;
    std::memcpy(&low, p, first);
    if constexpr (rest == 1) high = p[first];
    else std::memcpy(&high, p + first, rest);
    uint64_t v = low | static_cast<uint64_t>(high) << 8 * first;
    v = (v & four) | (v >> 4 * Bits & four) << 32;
    v = (v & two) | (v >> 2 * Bits & two) << 16;
    v = (v & one) | (v >> Bits & one) << 8;
    std::memcpy(to + i, &v, 8);
  }
}
static inline void unpack(const uint8_t* p, int bits, uint8_t* to, int64_t n) {
  switch (bits) {
    case 2: return unpack<2>(p, to, n);
    case 3: return unpack<3>(p, to, n);
    case 5: return unpack<5>(p, to, n);
    default: return unpack<6>(p, to, n);
  }
}

}  // namespace qgraph::QGRAPH_ISA::int8
