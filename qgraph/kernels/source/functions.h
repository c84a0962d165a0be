// Functions of a vector of floats, within 2 ulp of the exact value (sigmoid, tanh, logaddexp: 3), right at
// zeros, infinities and NaN and among the subnormals. Without a fused multiply-add the last bits are worse.
// (Not called math.h: <math.h> would find it.)
#pragma once
#include <cmath>

namespace qgraph::QGRAPH_ISA {

static constexpr float INFINITE = __builtin_huge_valf();

// The sum of coefficients * powers of x, the highest power first.
template <class... Rest> static inline V polynomial(V x, float first, Rest... rest) {
  V sum = set1(first);
  ((sum = fma(sum, x, set1(rest))), ...);
  return sum;
}

static inline V copy_sign(V magnitude, V sign) {
  return from_bits((bits(magnitude) & seti(0x7fffffff)) | (bits(sign) & seti(INT32_MIN)));
}

// 2^k for an integer k in [-126, 127].
static inline V power_of_two(I k) { return from_bits(shift_left<23>(k + seti(127))); }

// a * 2^k for an integer k in [-252, 254]; rounded once, also to a subnormal.
static inline V scale_by_power(V a, V k) {
#if defined(__AVX512F__)
  return {_mm512_scalef_ps(a.v, k.v)};
#else
  I all = to_int(k), half = shift_right<1>(all + seti(512)) - seti(256);
  return a * power_of_two(half) * power_of_two(all - half);
#endif
}

// x = k ln 2 + r with |r| <= ln(2) / 2; the first part of ln 2 has few bits, so that k times it is exact.
static inline V reduce_by_ln2(V x, V& k) {
  k = round(x * set1(1.44269504f));
  return fma(k, set1(-1.42860677e-6f), fma(k, set1(-0.693145752f), x));
}

// e^r - 1 for |r| <= ln(2) / 2.
static inline V expm1_near_zero(V r) {
  V p = polynomial(r, 1.98756915e-4f, 1.39819995e-3f, 8.33345191e-3f, 4.16657959e-2f, 1.66666655e-1f, 0.5f);
  return fma(p * r, r, r);
}

static inline V exp(V x) {
  x = max(set1(-104.0f), min(set1(89.0f), x));  // beyond: 0 and infinity. NaN, the second operand, stays
  V k, r = reduce_by_ln2(x, k);
  return scale_by_power(set1(1.0f) + expm1_near_zero(r), k);
}

static inline V expm1(V x) {
  V k, bounded = max(set1(-20.0f), min(set1(89.0f), x)), r = reduce_by_ln2(bounded, k);
  // 2^k (1 + p) - 1; half of it first, because 2^128 is no float. One below 2^24 keeps all its digits.
  V half = scale_by_power(set1(0.5f), k);
  V sum = fma(expm1_near_zero(r), half, half - set1(0.5f));
  return copy_sign(sum + sum, x);
}

static inline V log(V x) {
  M subnormal = x < set1(1.17549435e-38f);
  I scaled = bits(select(subnormal, x * set1(0x1p23f), x));
  // x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  I up = scaled + seti(0x3f800000 - 0x3f3504f3);
  V e = to_float(shift_right<23>(up) - seti(127)) - select(subnormal, set1(23.0f), zero());
  V f = from_bits((up & seti(0x007fffff)) + seti(0x3f3504f3)) - set1(1.0f);
  V z = f * f;
  V p = polynomial(f, 7.03768363e-2f, -1.15146103e-1f, 1.16769987e-1f, -1.24201408e-1f, 1.42493228e-1f,
                   -1.66680577e-1f, 2.00007148e-1f, -2.49999940e-1f, 3.33333312e-1f);
  V rest = fma(z, set1(-0.5f), fma(e, set1(-2.12194440e-4f), p * f * z));
  V y = fma(e, set1(0.693359375f), f + rest);
  y = select(x < set1(INFINITE), y, x);                       // infinity and NaN
  y = select(x == zero(), set1(-INFINITE), y);
  return select(x < zero(), set1(__builtin_nanf("")), y);
}

static inline V log1p(V x) {
  V u = set1(1.0f) + x;
  V y = log(u) + (x - (u - set1(1.0f))) / u;                  // what the sum lost
  y = select(set1(-1.0f) < x, y, log(u));                     // -infinity at -1, NaN below
  return select((x == zero()) | (x == set1(INFINITE)), x, y);     // and -0 stays
}

static inline V tanh(V x) {
  V e = expm1(min(set1(20.0f), abs(x) + abs(x)));
  return copy_sign(e / (e + set1(2.0f)), x);
}

static inline V sigmoid(V x) {
  V e = exp(-abs(x));
  return select(x < zero(), e, set1(1.0f)) / (set1(1.0f) + e);
}

static inline V erf(V x) {
  V t = abs(x), s = x * x;
  V q = polynomial(s, -5.96761703e-4f, 4.99119423e-3f, -2.67681349e-2f, 1.12819925e-1f, -3.76125336e-1f,
                   1.28379166e-1f);
  V small = fma(q, x, x);
  t = min(set1(4.0f), t);  // erf is 1 from there on
  V p = polynomial(t, -1.72853470e-5f, 3.83197126e-4f, -3.88396438e-3f, 2.42546219e-2f, -1.06777877e-1f,
                   -6.34846687e-1f, -1.28717512e-1f);
  V large = set1(1.0f) - exp(fma(p, t, -t));
  return select(set1(0.927734375f) < abs(x), copy_sign(large, x), small);
}

static inline V rsqrt(V x) { return set1(1.0f) / sqrt(x); }

static inline V logaddexp(V a, V b) {
  V high = max(a, b), low = min(a, b);
  V y = high + log1p(exp(low - high));
  y = select((low == set1(-INFINITE)) | (high == set1(INFINITE)), high, y);
  return select(a == a, select(b == b, y, b), a);
}

template <class F> static inline V each_lane(V x, F f) {
  float lanes[V::W];
  store(lanes, x);
  for (int i = 0; i < V::W; i++) lanes[i] = f(lanes[i]);
  return load(lanes);
}

// sin(x + quarters * pi / 2), by multiples of pi / 2 in three parts.
template <int QUARTERS> static inline V sine(V x) {
  V k = round(x * set1(0.636619772f));
  V r = fma(k, set1(1.71512451e-15f), fma(k, set1(4.37113883e-8f), fma(k, set1(-1.57079637f), x)));
  V z = r * r;
  V sin = fma(polynomial(z, -1.95152959e-4f, 8.33216087e-3f, -1.66666546e-1f) * z, r, r);
  V parabola = fma(z, set1(-0.5f), set1(1.0f));
  V cos = fma(polynomial(z, 2.44331571e-5f, -1.38873162e-3f, 4.16666456e-2f) * z, z, parabola);
  I quadrant = to_int(k) + seti(QUARTERS);
  V turned = select(to_float(quadrant & seti(1)) == zero(), sin, cos);
  turned = turned * from_bits(shift_left<30>(quadrant & seti(2)) | seti(0x3f800000));  // ±1
  return QUARTERS == 0 ? select(x == zero(), x, turned) : turned;
}

// How far `sine` is exact enough: the products need a fused multiply-add.
#if defined(__FMA__) || defined(__ARM_NEON)
static constexpr float FAR = 0x1p20f;
#else
static constexpr float FAR = 0.0f;
#endif

static inline bool all_near(V x) { return sum(select(abs(x) <= set1(FAR), zero(), set1(1.0f))) == 0.0f; }

static inline V sin(V x) {
  return FAR > 0.0f && all_near(x) ? sine<0>(x) : each_lane(x, [](float a) { return std::sin(a); });
}
static inline V cos(V x) {
  return FAR > 0.0f && all_near(x) ? sine<1>(x) : each_lane(x, [](float a) { return std::cos(a); });
}

}  // namespace qgraph::QGRAPH_ISA
