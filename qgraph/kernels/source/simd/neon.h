// NEON of 64-bit Arm: 4 floats. What each function means stands in portable.h.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace qgraph::QGRAPH_ISA {

struct V {
  float32x4_t v;
  static constexpr int W = 4;
};
struct M {
  uint32x4_t m;  // all bits of a lane, or none
};
struct I {
  int32x4_t v;
};

static inline V set1(float a) { return {vdupq_n_f32(a)}; }
static inline V zero() { return set1(0.0f); }

// There are no masked loads: the few numbers at the end of a row go through memory.
static inline V load(const float* p) { return {vld1q_f32(p)}; }
static inline V load(const float* p, int n) {
  float lanes[4] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * 4);
  return load(lanes);
}
static inline void store(float* p, V a) { vst1q_f32(p, a.v); }
static inline void store(float* p, V a, int n) {
  float lanes[4];
  store(lanes, a);
  std::memcpy(p, lanes, static_cast<size_t>(n) * 4);
}
static inline uint16x4_t load16(const uint16_t* p, int n) {
  uint16_t lanes[4] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * 2);
  return vld1_u16(lanes);
}
static inline void store16(uint16_t* p, uint16x4_t a, int n) {
  uint16_t lanes[4];
  vst1_u16(lanes, a);
  std::memcpy(p, lanes, static_cast<size_t>(n) * 2);
}

static inline V from_bf16(uint16x4_t h) { return {vreinterpretq_f32_u32(vshll_n_u16(h, 16))}; }
static inline uint16x4_t to_bf16(V a) {  // to the nearest, ties to even; a NaN stays one
  uint32x4_t u = vreinterpretq_u32_f32(a.v);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  uint16x4_t r = vshrn_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  return vbsl_u16(vmovn_u32(vceqq_f32(a.v, a.v)), r, vdup_n_u16(0x7fc0));
}
static inline V load_bf16(const uint16_t* p) { return from_bf16(vld1_u16(p)); }
static inline V load_bf16(const uint16_t* p, int n) { return from_bf16(load16(p, n)); }
static inline void store_bf16(uint16_t* p, V a) { vst1_u16(p, to_bf16(a)); }
static inline void store_bf16(uint16_t* p, V a, int n) { store16(p, to_bf16(a), n); }

static inline V from_f16(uint16x4_t h) { return {vcvt_f32_f16(vreinterpret_f16_u16(h))}; }
static inline uint16x4_t to_f16(V a) { return vreinterpret_u16_f16(vcvt_f16_f32(a.v)); }
static inline V load_f16(const uint16_t* p) { return from_f16(vld1_u16(p)); }
static inline V load_f16(const uint16_t* p, int n) { return from_f16(load16(p, n)); }
static inline void store_f16(uint16_t* p, V a) { vst1_u16(p, to_f16(a)); }
static inline void store_f16(uint16_t* p, V a, int n) { store16(p, to_f16(a), n); }

static inline V operator+(V a, V b) { return {vaddq_f32(a.v, b.v)}; }
static inline V operator-(V a, V b) { return {vsubq_f32(a.v, b.v)}; }
static inline V operator*(V a, V b) { return {vmulq_f32(a.v, b.v)}; }
static inline V operator/(V a, V b) { return {vdivq_f32(a.v, b.v)}; }
static inline V operator-(V a) { return {vnegq_f32(a.v)}; }
static inline V fma(V a, V b, V c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
// Arm's own max and min give NaN where either is one; these give b, as on the other machines.
static inline V max(V a, V b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
static inline V min(V a, V b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
static inline V abs(V a) { return {vabsq_f32(a.v)}; }
static inline V sqrt(V a) { return {vsqrtq_f32(a.v)}; }
static inline V round(V a) { return {vrndnq_f32(a.v)}; }
static inline V floor(V a) { return {vrndmq_f32(a.v)}; }

static inline M operator<(V a, V b) { return {vcltq_f32(a.v, b.v)}; }
static inline M operator<=(V a, V b) { return {vcleq_f32(a.v, b.v)}; }
static inline M operator==(V a, V b) { return {vceqq_f32(a.v, b.v)}; }
static inline M operator&(M a, M b) { return {vandq_u32(a.m, b.m)}; }
static inline M operator|(M a, M b) { return {vorrq_u32(a.m, b.m)}; }
static inline V select(M m, V a, V b) { return {vbslq_f32(m.m, a.v, b.v)}; }

static inline I to_int(V a) { return {vcvtnq_s32_f32(a.v)}; }
static inline V to_float(I a) { return {vcvtq_f32_s32(a.v)}; }
static inline I bits(V a) { return {vreinterpretq_s32_f32(a.v)}; }
static inline V from_bits(I a) { return {vreinterpretq_f32_s32(a.v)}; }
static inline I seti(int32_t a) { return {vdupq_n_s32(a)}; }
static inline I operator+(I a, I b) { return {vaddq_s32(a.v, b.v)}; }
static inline I operator-(I a, I b) { return {vsubq_s32(a.v, b.v)}; }
static inline I operator&(I a, I b) { return {vandq_s32(a.v, b.v)}; }
static inline I operator|(I a, I b) { return {vorrq_s32(a.v, b.v)}; }
template <int N> static inline I shift_left(I a) { return {vshlq_n_s32(a.v, N)}; }
template <int N> static inline I shift_right(I a) {  // zeros come in from the left, and N may be 0
  return {vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a.v), vdupq_n_s32(-N)))};
}

static inline float sum(V a) { return vaddvq_f32(a.v); }
static inline float largest(V a) {
  float lanes[4];
  store(lanes, a);
  float r = lanes[0];
  for (float lane : lanes) r = r > lane ? r : lane;
  return r;
}

}  // namespace qgraph::QGRAPH_ISA
