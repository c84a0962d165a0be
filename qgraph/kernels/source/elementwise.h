// Chains of element-wise operations, computed a block at a time: every operand of a block is widened to
// floats in a register that lies in the first-level cache, every instruction goes over the block, and the
// last register is rounded and written. What has 16 bits is rounded as if each operation had written it.
#pragma once
#include "chain.h"
#include "functions.h"
#include "pool.h"

namespace qgraph::QGRAPH_ISA {

static constexpr int BLOCK = 512;  // a multiple of V::W

static inline V round_to_bf16(V a) {
  I u = bits(a);
  I up = u + seti(0x7fff) + (shift_right<16>(u) & seti(1));
  return select(a == a, from_bits(up & seti(static_cast<int32_t>(0xffff0000))), a);
}

static inline V round_to_f16(V a) {
  uint16_t halves[V::W];
  store_f16(halves, a);
  return load_f16(halves);
}

// ---- Loading and storing ----

template <class T> static inline void widen_integers(const T* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = static_cast<float>(from[i]);
}

// `n` elements that lie `stride` apart, as floats.
template <class T, class Widen>
static inline void load_row(const T* from, int64_t stride, float* to, int n, Widen widen) {
  if (stride == 1) return widen(from, to, n);
  if (stride == 0) {
    float one;
    widen(from, &one, 1);
    for (int i = 0; i < n; i++) to[i] = one;
    return;
  }
  T row[BLOCK];
  for (int i = 0; i < n; i++) row[i] = from[i * stride];
  widen(row, to, n);
}

static void load_row(Element type, const void* data, int64_t offset, int64_t stride, float* to, int n) {
  auto floats = [&](auto e) {
    using E = decltype(e);
    load_row(static_cast<const typename E::T*>(data) + offset, stride, to, n, widen<E>);
  };
  switch (type) {
    case Element::f32: return floats(F32{});
    case Element::bf16: return floats(BF16{});
    case Element::f16: return floats(F16{});
    case Element::boolean:
      return load_row(static_cast<const uint8_t*>(data) + offset, stride, to, n, widen_integers<uint8_t>);
    case Element::i32:
      return load_row(static_cast<const int32_t*>(data) + offset, stride, to, n, widen_integers<int32_t>);
  }
}

// Elements start … start + n of an operand, row after row of its last axis.
static void load_block(const Operand& o, int64_t start, int n, float* to) {
  int64_t position[Operand::AXES], offset = 0;
  int last = o.axes - 1;
  for (int i = last; i >= 0; i--) {
    position[i] = start % o.layout[i].size;
    start /= o.layout[i].size;
    offset += position[i] * o.layout[i].stride;
  }
  for (;;) {
    const Axis& row = o.layout[last];
    int64_t left = row.size - position[last];
    int piece = static_cast<int>(left < n ? left : n);
    load_row(o.type, o.data, offset, row.stride, to, piece);
    to += piece, n -= piece;
    if (n == 0) return;
    offset -= position[last] * row.stride, position[last] = 0;
    for (int i = last - 1; i >= 0; i--) {
      offset += o.layout[i].stride;
      if (++position[i] < o.layout[i].size) break;
      offset -= o.layout[i].size * o.layout[i].stride, position[i] = 0;
    }
  }
}

static void store_block(const float* from, void* y, Element type, int64_t start, int n) {
  switch (type) {
    case Element::f32: return narrow<F32>(from, static_cast<float*>(y) + start, n);
    case Element::bf16: return narrow<BF16>(from, static_cast<uint16_t*>(y) + start, n);
    case Element::f16: return narrow<F16>(from, static_cast<uint16_t*>(y) + start, n);
    case Element::boolean:
      for (int i = 0; i < n; i++) static_cast<uint8_t*>(y)[start + i] = from[i] != 0.0f;
      return;
    case Element::i32: return;  // operands only
  }
}

// ---- Instructions ----

// The registers of an instruction and how many floats of them count, rounded up to whole vectors.
struct Frame {
  float* to;
  const float *a, *b, *c;
  int n;
};

template <class Round, class F> static inline void over(const Frame& f, Round round, F function) {
  for (int i = 0; i < f.n; i += V::W)
    store(f.to + i, round(function(load(f.a + i), load(f.b + i), load(f.c + i))));
}

template <class F> static inline void over(const Frame& f, Element rounding, F function) {
  switch (rounding) {
    case Element::bf16: return over(f, round_to_bf16, function);
    case Element::f16: return over(f, round_to_f16, function);
    default: return over(f, [](V a) { return a; }, function);
  }
}

static inline V truth(M m) { return select(m, set1(1.0f), zero()); }
static inline V denied(M m) { return select(m, zero(), set1(1.0f)); }
static inline M is_zero(V a) { return a == zero(); }

// The second operand of max and min passes where one is NaN: it must not where the first is.
static inline V maximum(V a, V b) { return select(a == a, max(a, b), a); }
static inline V minimum(V a, V b) { return select(a == a, min(a, b), a); }

static inline V power(V a, V b) {
  float x[V::W], y[V::W];
  store(x, a), store(y, b);
  for (int i = 0; i < V::W; i++) x[i] = std::pow(x[i], y[i]);
  return load(x);
}

static void execute(Operation operation, Element r, const Frame& f) {
  using O = Operation;
  switch (operation) {
    case O::copy: return over(f, r, [](V a, V, V) { return a; });
    case O::negative: return over(f, r, [](V a, V, V) { return -a; });
    case O::abs: return over(f, r, [](V a, V, V) { return abs(a); });
    case O::square: return over(f, r, [](V a, V, V) { return a * a; });
    case O::cube: return over(f, r, [](V a, V, V) { return a * a * a; });
    case O::reciprocal: return over(f, r, [](V a, V, V) { return set1(1.0f) / a; });
    case O::sqrt: return over(f, r, [](V a, V, V) { return sqrt(a); });
    case O::rsqrt: return over(f, r, [](V a, V, V) { return rsqrt(a); });
    case O::floor: return over(f, r, [](V a, V, V) { return floor(a); });
    case O::ceil: return over(f, r, [](V a, V, V) { return -floor(-a); });
    case O::round: return over(f, r, [](V a, V, V) { return round(a); });
    case O::relu: return over(f, r, [](V a, V, V) { return maximum(a, zero()); });
    case O::exp: return over(f, r, [](V a, V, V) { return exp(a); });
    case O::expm1: return over(f, r, [](V a, V, V) { return expm1(a); });
    case O::log: return over(f, r, [](V a, V, V) { return log(a); });
    case O::log1p: return over(f, r, [](V a, V, V) { return log1p(a); });
    case O::sin: return over(f, r, [](V a, V, V) { return sin(a); });
    case O::cos: return over(f, r, [](V a, V, V) { return cos(a); });
    case O::tanh: return over(f, r, [](V a, V, V) { return tanh(a); });
    case O::sigmoid: return over(f, r, [](V a, V, V) { return sigmoid(a); });
    case O::erf: return over(f, r, [](V a, V, V) { return erf(a); });
    case O::logical_not: return over(f, r, [](V a, V, V) { return truth(is_zero(a)); });
    case O::add: return over(f, r, [](V a, V b, V) { return a + b; });
    case O::subtract: return over(f, r, [](V a, V b, V) { return a - b; });
    case O::multiply: return over(f, r, [](V a, V b, V) { return a * b; });
    case O::divide: return over(f, r, [](V a, V b, V) { return a / b; });
    case O::maximum: return over(f, r, [](V a, V b, V) { return maximum(a, b); });
    case O::minimum: return over(f, r, [](V a, V b, V) { return minimum(a, b); });
    case O::power: return over(f, r, [](V a, V b, V) { return power(a, b); });
    case O::logaddexp: return over(f, r, [](V a, V b, V) { return logaddexp(a, b); });
    case O::equal: return over(f, r, [](V a, V b, V) { return truth(a == b); });
    case O::not_equal: return over(f, r, [](V a, V b, V) { return denied(a == b); });
    case O::less: return over(f, r, [](V a, V b, V) { return truth(a < b); });
    case O::less_equal: return over(f, r, [](V a, V b, V) { return truth(a <= b); });
    case O::greater: return over(f, r, [](V a, V b, V) { return truth(b < a); });
    case O::greater_equal: return over(f, r, [](V a, V b, V) { return truth(b <= a); });
    case O::logical_and: return over(f, r, [](V a, V b, V) { return denied(is_zero(a) | is_zero(b)); });
    case O::logical_or: return over(f, r, [](V a, V b, V) { return denied(is_zero(a) & is_zero(b)); });
    case O::where: return over(f, r, [](V a, V b, V c) { return select(is_zero(a), c, b); });
  }
}

// ---- The chain ----

// Whether floats start … start + BLOCK of the operand lie in a row, to be read where they are.
static inline bool in_place(const Operand& o) {
  return o.type == Element::f32 && o.axes == 1 && o.layout[0].stride == 1;
}

static void run_blocks(const Elementwise& e, int64_t start, int64_t end) {
  auto* memory = static_cast<float*>(scratch(4, int64_t(e.registers) * BLOCK * sizeof(float)));
  auto own = [&](uint8_t r) { return memory + int64_t(r) * BLOCK; };
  const float* at[256];  // where the numbers of each register are
  for (int i = 0; i < e.constant_count; i++) {
    float* to = own(e.constants[i].to);
    for (int j = 0; j < BLOCK; j += V::W) store(to + j, set1(e.constants[i].value));
    at[e.constants[i].to] = to;
  }
  for (; start < end; start += BLOCK) {
    int n = static_cast<int>(end - start < BLOCK ? end - start : BLOCK);
    int whole = (n + V::W - 1) / V::W * V::W;  // what lies behind the n-th float of a register is nobody's
    for (int i = 0; i < e.operand_count; i++) {
      const Operand& o = e.operands[i];
      if (n == whole && in_place(o)) {
        at[o.to] = static_cast<const float*>(o.data) + start;
      } else {
        load_block(o, start, n, own(o.to));
        at[o.to] = own(o.to);
      }
    }
    const float* result = nullptr;
    for (int i = 0; i < e.instruction_count; i++) {
      const Instruction& in = e.instructions[i];
      bool last = i == e.instruction_count - 1 && e.y_type == Element::f32 && n == whole;
      float* to = last ? static_cast<float*>(e.y) + start : own(in.to);
      execute(in.operation, in.rounding, {to, at[in.a], at[in.b], at[in.c], whole});
      at[in.to] = to;
      if (last) result = to;
    }
    if (!result) store_block(at[e.result], e.y, e.y_type, start, n);
  }
}

static void elementwise(const Elementwise& e) {
  constexpr double TASK = 3e4;  // nanoseconds
  auto blocks = static_cast<int64_t>(TASK / (e.nanoseconds * BLOCK));
  int64_t step = (blocks > 0 ? blocks : 1) * BLOCK;
  parallel((e.count + step - 1) / step, e.nanoseconds * static_cast<double>(e.count), [&](int64_t task) {
    int64_t start = task * step, end = start + step;
    run_blocks(e, start, end < e.count ? end : e.count);
  });
}

}  // namespace qgraph::QGRAPH_ISA
