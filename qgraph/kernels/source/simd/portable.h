// Eight floats in plain C++, for any machine; also the place where the vector functions are explained.
//
// V holds W floats, I as many 32-bit integers, M as many truth values. `load(p, n)` reads the first n
// floats, 0 <= n <= W, and gives zeros for the rest; `store(p, a, n)` writes the first n and nothing else.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace qgraph::QGRAPH_ISA {

struct V {
  float v[8];
  static constexpr int W = 8;
};
struct M {
  bool m[8];
};
struct I {
  int32_t v[8];
};

#define EACH for (int i = 0; i < 8; i++)

static inline V set1(float a) { V r; EACH r.v[i] = a; return r; }
static inline V zero() { return set1(0.0f); }

static inline V load(const float* p) { V r; EACH r.v[i] = p[i]; return r; }
static inline V load(const float* p, int n) { V r; EACH r.v[i] = i < n ? p[i] : 0.0f; return r; }
static inline void store(float* p, V a) { EACH p[i] = a.v[i]; }
static inline void store(float* p, V a, int n) { EACH if (i < n) p[i] = a.v[i]; }

// bf16: the upper half of a float; stores round to the nearest, ties to even, and keep a NaN one.
static inline float bf16_one(uint16_t h) {
  uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline uint16_t to_bf16_one(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return f != f ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline V load_bf16(const uint16_t* p) { V r; EACH r.v[i] = bf16_one(p[i]); return r; }
static inline V load_bf16(const uint16_t* p, int n) { V r; EACH r.v[i] = i < n ? bf16_one(p[i]) : 0.0f; return r; }
static inline void store_bf16(uint16_t* p, V a) { EACH p[i] = to_bf16_one(a.v[i]); }
static inline void store_bf16(uint16_t* p, V a, int n) { EACH if (i < n) p[i] = to_bf16_one(a.v[i]); }

// f16: IEEE half precision with its subnormals; stores round to the nearest, ties to even.
static inline float f16_one(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, body = h & 0x7fff, u;
  if (body >= 0x7c00) u = 0x7f800000 | (body & 0x3ff) << 13;      // infinity, NaN
  else if (body >= 0x400) u = (body << 13) + ((127 - 15) << 23);  // normal
  else return sign ? -static_cast<float>(body) * 0x1p-24f : static_cast<float>(body) * 0x1p-24f;
  u |= sign;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
static inline uint16_t to_f16_one(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;
  if (u >= 0x477ff000) return sign | 0x7c00;  // 65520 and above
  if (u < 0x38800000) {                       // below the smallest normal: in units of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &u, 4);
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  }
  return sign | static_cast<uint16_t>((u - ((127 - 15) << 23) + 0xfff + (u >> 13 & 1)) >> 13);
}
static inline V load_f16(const uint16_t* p) { V r; EACH r.v[i] = f16_one(p[i]); return r; }
static inline V load_f16(const uint16_t* p, int n) { V r; EACH r.v[i] = i < n ? f16_one(p[i]) : 0.0f; return r; }
static inline void store_f16(uint16_t* p, V a) { EACH p[i] = to_f16_one(a.v[i]); }
static inline void store_f16(uint16_t* p, V a, int n) { EACH if (i < n) p[i] = to_f16_one(a.v[i]); }

static inline V operator+(V a, V b) { EACH a.v[i] += b.v[i]; return a; }
static inline V operator-(V a, V b) { EACH a.v[i] -= b.v[i]; return a; }
static inline V operator*(V a, V b) { EACH a.v[i] *= b.v[i]; return a; }
static inline V operator/(V a, V b) { EACH a.v[i] /= b.v[i]; return a; }
static inline V operator-(V a) { EACH a.v[i] = -a.v[i]; return a; }
static inline V fma(V a, V b, V c) { EACH c.v[i] += a.v[i] * b.v[i]; return c; }  // one rounding where the CPU can
static inline V max(V a, V b) { EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }  // b where unordered
static inline V min(V a, V b) { EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
static inline V abs(V a) { EACH a.v[i] = std::fabs(a.v[i]); return a; }
static inline V sqrt(V a) { EACH a.v[i] = std::sqrt(a.v[i]); return a; }
static inline V round(V a) { EACH a.v[i] = std::nearbyint(a.v[i]); return a; }  // ties to even
static inline V floor(V a) { EACH a.v[i] = std::floor(a.v[i]); return a; }

static inline M operator<(V a, V b) { M r; EACH r.m[i] = a.v[i] < b.v[i]; return r; }
static inline M operator<=(V a, V b) { M r; EACH r.m[i] = a.v[i] <= b.v[i]; return r; }
static inline M operator==(V a, V b) { M r; EACH r.m[i] = a.v[i] == b.v[i]; return r; }
static inline M operator&(M a, M b) { EACH a.m[i] = a.m[i] && b.m[i]; return a; }
static inline M operator|(M a, M b) { EACH a.m[i] = a.m[i] || b.m[i]; return a; }
static inline V select(M m, V a, V b) { EACH b.v[i] = m.m[i] ? a.v[i] : b.v[i]; return b; }  // m ? a : b

// to_int rounds to the nearest; a number beyond 32 bits (or a NaN) gives some integer, not undefined behaviour.
static inline I to_int(V a) {
  I r;
  EACH r.v[i] = std::fabs(a.v[i]) < 0x1p31f ? static_cast<int32_t>(std::nearbyint(a.v[i])) : INT32_MIN;
  return r;
}
static inline V to_float(I a) { V r; EACH r.v[i] = static_cast<float>(a.v[i]); return r; }
static inline I bits(V a) { I r; std::memcpy(&r, &a, sizeof r); return r; }
static inline V from_bits(I a) { V r; std::memcpy(&r, &a, sizeof r); return r; }
static inline I seti(int32_t a) { I r; EACH r.v[i] = a; return r; }
// Integers wrap around.
static inline uint32_t u(int32_t a) { return static_cast<uint32_t>(a); }
static inline I operator+(I a, I b) { EACH a.v[i] = static_cast<int32_t>(u(a.v[i]) + u(b.v[i])); return a; }
static inline I operator-(I a, I b) { EACH a.v[i] = static_cast<int32_t>(u(a.v[i]) - u(b.v[i])); return a; }
static inline I operator&(I a, I b) { EACH a.v[i] &= b.v[i]; return a; }
static inline I operator|(I a, I b) { EACH a.v[i] |= b.v[i]; return a; }
template <int N> static inline I shift_left(I a) { EACH a.v[i] = static_cast<int32_t>(u(a.v[i]) << N); return a; }
template <int N> static inline I shift_right(I a) { EACH a.v[i] = static_cast<int32_t>(u(a.v[i]) >> N); return a; }

static inline float sum(V a) {
  return ((a.v[0] + a.v[4]) + (a.v[1] + a.v[5])) + ((a.v[2] + a.v[6]) + (a.v[3] + a.v[7]));
}
static inline float largest(V a) { float r = a.v[0]; EACH r = r > a.v[i] ? r : a.v[i]; return r; }

#undef EACH

}  // namespace qgraph::QGRAPH_ISA
