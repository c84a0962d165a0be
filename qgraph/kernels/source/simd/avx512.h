// AVX-512 F, BW, DQ and VL: 16 floats. What each function means stands in portable.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace qgraph::QGRAPH_ISA {

struct V {
  __m512 v;
  static constexpr int W = 16;
};
struct M {
  __mmask16 m;
};
struct I {
  __m512i v;
};

static inline __mmask16 first(int n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }

static inline V set1(float a) { return {_mm512_set1_ps(a)}; }
static inline V zero() { return {_mm512_setzero_ps()}; }

static inline V load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline V load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
static inline void store(float* p, V a) { _mm512_storeu_ps(p, a.v); }
static inline void store(float* p, V a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }

static inline V from_bf16(__m256i h) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
static inline __m256i to_bf16(V a) {  // to the nearest, ties to even; a NaN stays one
  __m512i u = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0)));
}
static inline V load_bf16(const uint16_t* p) {
  return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline V load_bf16(const uint16_t* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
static inline void store_bf16(uint16_t* p, V a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16(a));
}
static inline void store_bf16(uint16_t* p, V a, int n) { _mm256_mask_storeu_epi16(p, first(n), to_bf16(a)); }

static inline V load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline V load_f16(const uint16_t* p, int n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))};
}
static inline void store_f16(uint16_t* p, V a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store_f16(uint16_t* p, V a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

static inline V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline V operator/(V a, V b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline V operator-(V a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
static inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline V min(V a, V b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline V abs(V a) { return {_mm512_abs_ps(a.v)}; }
static inline V sqrt(V a) { return {_mm512_sqrt_ps(a.v)}; }
static inline V round(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline V floor(V a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }

static inline M operator<(V a, V b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
static inline M operator<=(V a, V b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
static inline M operator==(V a, V b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
static inline M operator&(M a, M b) { return {static_cast<__mmask16>(a.m & b.m)}; }
static inline M operator|(M a, M b) { return {static_cast<__mmask16>(a.m | b.m)}; }
static inline V select(M m, V a, V b) { return {_mm512_mask_blend_ps(m.m, b.v, a.v)}; }

static inline I to_int(V a) { return {_mm512_cvtps_epi32(a.v)}; }
static inline V to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline I bits(V a) { return {_mm512_castps_si512(a.v)}; }
static inline V from_bits(I a) { return {_mm512_castsi512_ps(a.v)}; }
static inline I seti(int32_t a) { return {_mm512_set1_epi32(a)}; }
static inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
static inline I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
static inline I operator|(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int N> static inline I shift_left(I a) { return {_mm512_slli_epi32(a.v, N)}; }
template <int N> static inline I shift_right(I a) { return {_mm512_srli_epi32(a.v, N)}; }

static inline float sum(V a) { return _mm512_reduce_add_ps(a.v); }
static inline float largest(V a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace qgraph::QGRAPH_ISA
