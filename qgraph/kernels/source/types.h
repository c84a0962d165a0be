// Elements of the three types as vectors of floats.
#pragma once
#include "kernels.h"

namespace qgraph::QGRAPH_ISA {

struct F32 {
  using T = float;
  static V load(const T* p) { return QGRAPH_ISA::load(p); }
  static V load(const T* p, int n) { return QGRAPH_ISA::load(p, n); }
  static void store(T* p, V a) { QGRAPH_ISA::store(p, a); }
  static void store(T* p, V a, int n) { QGRAPH_ISA::store(p, a, n); }
};

struct BF16 {
  using T = uint16_t;
  static V load(const T* p) { return load_bf16(p); }
  static V load(const T* p, int n) { return load_bf16(p, n); }
  static void store(T* p, V a) { store_bf16(p, a); }
  static void store(T* p, V a, int n) { store_bf16(p, a, n); }
};

struct F16 {
  using T = uint16_t;
  static V load(const T* p) { return load_f16(p); }
  static V load(const T* p, int n) { return load_f16(p, n); }
  static void store(T* p, V a) { store_f16(p, a); }
  static void store(T* p, V a, int n) { store_f16(p, a, n); }
};

// f(E{}) with the E of `type`.
template <class F> static inline void with(Type type, const F& f) {
  switch (type) {
    case Type::f32: return f(F32{});
    case Type::bf16: return f(BF16{});
    case Type::f16: return f(F16{});
  }
}

// Ask for memory that is read soon, as far as L2: a core can have more lines on their way there than to L1, and
// what reads much and computes little waits for memory alone.
static inline void ask_for(const void* memory) { __builtin_prefetch(memory, 0, 2); }

template <class E> static inline float load1(const typename E::T* p) {
  float lanes[V::W];
  store(lanes, E::load(p, 1));
  return lanes[0];
}

// `n` elements as floats, and back.
template <class E> static inline void widen(const typename E::T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + V::W <= n; i += V::W) store(to + i, E::load(from + i));
  if (i < n) store(to + i, E::load(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}
template <class E> static inline void narrow(const float* from, typename E::T* to, int64_t n) {
  int64_t i = 0;
  for (; i + V::W <= n; i += V::W) E::store(to + i, load(from + i));
  if (i < n) E::store(to + i, load(from + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}
static inline void widen(Type type, const void* from, float* to, int64_t n) {
  with(type, [&](auto e) {
    using E = decltype(e);
    widen<E>(static_cast<const typename E::T*>(from), to, n);
  });
}
static inline void narrow(Type type, const float* from, void* to, int64_t n) {
  with(type, [&](auto e) {
    using E = decltype(e);
    narrow<E>(from, static_cast<typename E::T*>(to), n);
  });
}

// `p` moved by `n` elements.
static inline const void* at(const void* p, Type type, int64_t n) {
  return static_cast<const char*>(p) + n * size_of(type);
}
static inline void* at(void* p, Type type, int64_t n) { return static_cast<char*>(p) + n * size_of(type); }

}  // namespace qgraph::QGRAPH_ISA
