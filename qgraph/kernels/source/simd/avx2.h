// AVX2 with FMA and F16C: 8 floats. What each function means stands in portable.h.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace qgraph::QGRAPH_ISA {

struct V {
  __m256 v;
  static constexpr int W = 8;
};
struct M {
  __m256 m;  // all bits of a lane, or none
};
struct I {
  __m256i v;
};

static inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline V set1(float a) { return {_mm256_set1_ps(a)}; }
static inline V zero() { return {_mm256_setzero_ps()}; }

static inline V load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline V load(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
static inline void store(float* p, V a) { _mm256_storeu_ps(p, a.v); }
static inline void store(float* p, V a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }

// There are no masked loads of 16 bits: the few numbers at the end of a row go through memory.
static inline __m128i load16(const uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
static inline __m128i load16(const uint16_t* p, int n) {
  uint16_t lanes[8] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * 2);
  return load16(lanes);
}
static inline void store16(uint16_t* p, __m128i a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), a); }
static inline void store16(uint16_t* p, __m128i a, int n) {
  uint16_t lanes[8];
  store16(lanes, a);
  std::memcpy(p, lanes, static_cast<size_t>(n) * 2);
}

static inline V from_bf16(__m128i h) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
static inline __m128i to_bf16(V a) {  // to the nearest, ties to even; a NaN stays one
  __m256i u = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
static inline V load_bf16(const uint16_t* p) { return from_bf16(load16(p)); }
static inline V load_bf16(const uint16_t* p, int n) { return from_bf16(load16(p, n)); }
static inline void store_bf16(uint16_t* p, V a) { store16(p, to_bf16(a)); }
static inline void store_bf16(uint16_t* p, V a, int n) { store16(p, to_bf16(a), n); }

static inline __m128i to_f16(V a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }
static inline V load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load16(p))}; }
static inline V load_f16(const uint16_t* p, int n) { return {_mm256_cvtph_ps(load16(p, n))}; }
static inline void store_f16(uint16_t* p, V a) { store16(p, to_f16(a)); }
static inline void store_f16(uint16_t* p, V a, int n) { store16(p, to_f16(a), n); }

static inline V operator+(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline V operator-(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline V operator*(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline V operator/(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline V operator-(V a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
static inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline V max(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline V min(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline V abs(V a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
static inline V sqrt(V a) { return {_mm256_sqrt_ps(a.v)}; }
static inline V round(V a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline V floor(V a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }

static inline M operator<(V a, V b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
static inline M operator<=(V a, V b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
static inline M operator==(V a, V b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
static inline M operator&(M a, M b) { return {_mm256_and_ps(a.m, b.m)}; }
static inline M operator|(M a, M b) { return {_mm256_or_ps(a.m, b.m)}; }
static inline V select(M m, V a, V b) { return {_mm256_blendv_ps(b.v, a.v, m.m)}; }

static inline I to_int(V a) { return {_mm256_cvtps_epi32(a.v)}; }
static inline V to_float(I a) { return {_mm256_cvtepi32_ps(a.v)}; }
static inline I bits(V a) { return {_mm256_castps_si256(a.v)}; }
static inline V from_bits(I a) { return {_mm256_castsi256_ps(a.v)}; }
static inline I seti(int32_t a) { return {_mm256_set1_epi32(a)}; }
static inline I operator+(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
static inline I operator-(I a, I b) { return {_mm256_sub_epi32(a.v, b.v)}; }
static inline I operator&(I a, I b) { return {_mm256_and_si256(a.v, b.v)}; }
static inline I operator|(I a, I b) { return {_mm256_or_si256(a.v, b.v)}; }
template <int N> static inline I shift_left(I a) { return {_mm256_slli_epi32(a.v, N)}; }
template <int N> static inline I shift_right(I a) { return {_mm256_srli_epi32(a.v, N)}; }

static inline float sum(V a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehdup_ps(s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehl_ps(s, s)));
}
static inline float largest(V a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehdup_ps(s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehl_ps(s, s)));
}

}  // namespace qgraph::QGRAPH_ISA
