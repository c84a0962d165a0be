// The vector functions of one instruction set against plain arithmetic, lane by lane. Compiled once a set:
// -DQGRAPH_ISA=avx2 '-DQGRAPH_SIMD="simd/avx2.h"' and the set's flags; driver.cpp calls check_lanes.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>

#include QGRAPH_SIMD

namespace qgraph::QGRAPH_ISA {

// Counts checks that hold and prints those that do not.
struct Tally {
  int passed = 0, failed = 0;
  void check(bool right, const char* what, float a, float b, double found, double expected) {
    right ? passed++ : failed++;
    if (right || failed > 20) return;
    std::printf("lanes: %s of %a, %a: found %a, expected %a\n", what, a, b, found, expected);
  }
  void same(const char* what, float a, float b, float found, float expected) {
    check(equal(found, expected), what, a, b, found, expected);
  }
  static bool equal(float a, float b) {  // NaN is one number here, zeros are two
    return (a == b && std::signbit(a) == std::signbit(b)) || (a != a && b != b);
  }
};

constexpr int W = V::W;

const float VALUES[] = {
    0.0f, -0.0f, 1.0f, -1.0f, 0.5f, 1.5f, 2.5f, -2.5f, 3.4999f, -7.75f, 1e-3f, 65504.0f, 65519.0f,
    65520.0f, -1e5f, 0x1p-14f, 0x1p-24f, 0x1p-25f, 0x1.8p-25f, 0x1.004p0f, 0x1.00cp0f, 0x1.01p0f,
    0x1.03p0f, 0x1.fep127f, 3e38f, 1e-40f, -1e-40f, 0x1p-126f, 8388609.0f, 123456.7f, -0.1f,
    std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
    std::numeric_limits<float>::quiet_NaN()};
constexpr int COUNT = sizeof VALUES / sizeof *VALUES;

static float lane(V a, int i) {
  float lanes[W];
  store(lanes, a);
  return lanes[i];
}

// To the nearest of the numbers with `digits` binary digits and nothing below `least`, ties to even.
static float rounded(float a, int digits, double least, double infinite) {
  if (a != a || std::isinf(a) || a == 0) return a;
  int power;
  std::frexp(static_cast<double>(a), &power);
  double step = std::fmax(std::ldexp(1.0, power - digits), least);
  double r = std::nearbyint(a / step) * step;
  if (std::fabs(r) >= infinite) r = std::copysign(std::numeric_limits<double>::infinity(), r);
  return static_cast<float>(r);
}

static void check_arithmetic(Tally& t, float a, float b, float c) {
  V x = set1(a), y = set1(b), z = set1(c);
  int i = W - 1;
  t.same("+", a, b, lane(x + y, i), a + b);
  t.same("-", a, b, lane(x - y, i), a - b);
  t.same("*", a, b, lane(x * y, i), a * b);
  t.same("/", a, b, lane(x / y, i), a / b);
  t.same("negate", a, b, lane(-x, i), -a);
  float fused = std::fma(a, b, c), apart = a * b + c, found = lane(fma(x, y, z), i);
  t.check(Tally::equal(found, fused) || Tally::equal(found, apart), "fma", a, b, found, fused);
  t.same("max", a, b, lane(max(x, y), i), a > b ? a : b);
  t.same("min", a, b, lane(min(x, y), i), a < b ? a : b);
  t.same("abs", a, b, lane(abs(x), i), std::fabs(a));
  if (a >= 0) t.same("sqrt", a, b, lane(sqrt(x), i), std::sqrt(a));
  t.same("round", a, b, lane(round(x), i), std::nearbyint(a));
  t.same("floor", a, b, lane(floor(x), i), std::floor(a));
  V yes = set1(1), no = set1(2);
  t.same("<", a, b, lane(select(x < y, yes, no), i), a < b ? 1 : 2);
  t.same("<=", a, b, lane(select(x <= y, yes, no), i), a <= b ? 1 : 2);
  t.same("==", a, b, lane(select(x == y, yes, no), i), a == b ? 1 : 2);
  t.same("&", a, b, lane(select((x <= y) & (z < x), yes, no), i), a <= b && c < a ? 1 : 2);
  t.same("|", a, b, lane(select((x < y) | (y == z), yes, no), i), a < b || b == c ? 1 : 2);
}

static void check_integers(Tally& t, float a, float b) {
  V x = set1(a), y = set1(b);
  uint32_t u, v;
  std::memcpy(&u, &a, 4);
  std::memcpy(&v, &b, 4);
  auto check = [&](const char* what, I found, uint32_t expected) {
    V lanes = from_bits(found);
    float f = lane(lanes, 0);
    uint32_t word;
    std::memcpy(&word, &f, 4);
    t.check(word == expected, what, a, b, word, expected);
  };
  check("bits", bits(x), u);
  check("+ of bits", bits(x) + bits(y), u + v);
  check("- of bits", bits(x) - bits(y), u - v);
  check("& of bits", bits(x) & bits(y), u & v);
  check("| of bits", bits(x) | seti(static_cast<int32_t>(v)), u | v);
  check("shift_left", shift_left<3>(bits(x)), u << 3);
  check("shift_right", shift_right<9>(bits(x)), u >> 9);
  if (std::fabs(a) < 2e9f) t.same("to_int", a, b, lane(to_float(to_int(x)), 0), std::nearbyint(a) + 0.0f);
  (void)to_int(x);  // and no harm beyond
}

static void check_memory(Tally& t, int start) {
  float from[W + 1], to[W + 1];
  for (int i = 0; i < W; i++) from[i] = VALUES[(start + i) % COUNT];
  for (int n = 0; n <= W; n++) {
    // Memory that ends after n numbers is not read or written beyond: the sanitizers look.
    float* end = new float[n];
    uint16_t *half = new uint16_t[n], *other = new uint16_t[n];
    std::memcpy(end, from, n * sizeof(float));
    V a = load(end, n);
    for (int i = 0; i < W; i++) t.same("load(n)", from[i], n, lane(a, i), i < n ? from[i] : 0.0f);
    std::memset(to, 0x55, sizeof to);
    store(to, load(from), n);
    float mark;
    std::memset(&mark, 0x55, sizeof mark);
    for (int i = 0; i < W; i++) t.same("store(n)", from[i], n, to[i], i < n ? from[i] : mark);
    store_bf16(half, load(from), n);
    store_f16(other, load(from), n);
    V b = load_bf16(half, n), f = load_f16(other, n);
    for (int i = 0; i < W; i++) {
      float bf16 = rounded(from[i], 8, 0x1p-133, 0x1p128), f16 = rounded(from[i], 11, 0x1p-24, 65520.0);
      t.same("bf16(n)", from[i], n, lane(b, i), i < n ? bf16 : 0.0f);
      t.same("f16(n)", from[i], n, lane(f, i), i < n ? f16 : 0.0f);
    }
    delete[] end;
    delete[] half;
    delete[] other;
  }
  uint16_t bf16[W], f16[W];
  store_bf16(bf16, load(from));
  store_f16(f16, load(from));
  for (int i = 0; i < W; i++) {
    t.same("bf16", from[i], 0, lane(load_bf16(bf16), i), rounded(from[i], 8, 0x1p-133, 0x1p128));
    t.same("f16", from[i], 0, lane(load_f16(f16), i), rounded(from[i], 11, 0x1p-24, 65520.0));
  }
}

static void check_reductions(Tally& t) {
  float lanes[W];
  for (int top = 0; top < W; top++) {
    double total = 0;
    for (int i = 0; i < W; i++) total += lanes[i] = i == top ? 100.0f : static_cast<float>(i) - 3.0f;
    t.same("sum", top, 0, sum(load(lanes)), static_cast<float>(total));
    t.same("largest", top, 0, largest(load(lanes)), 100.0f);
  }
  t.same("zero", 0, 0, lane(zero(), W - 1), 0.0f);
}

void check_lanes(int& passed, int& failed) {
  Tally t;
  for (float a : VALUES)
    for (float b : VALUES) {
      check_arithmetic(t, a, b, VALUES[(t.passed + t.failed) % COUNT]);
      check_integers(t, a, b);
    }
  for (int start = 0; start < COUNT; start++) check_memory(t, start);
  check_reductions(t);
  passed += t.passed, failed += t.failed;
}

}  // namespace qgraph::QGRAPH_ISA
