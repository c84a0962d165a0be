// Rotary positions: pairs of features turned by angles that grow with the position.
//
// The tables of cosines and sines of a position are computed once for all the rows that stand at it.
#pragma once
#include "functions.h"
#include "pool.h"

namespace qgraph::QGRAPH_ISA {

// (a[1], a[0], a[3], a[2], …)
static inline V swap_neighbours(V a) {
#if defined(__AVX512F__)
  return {_mm512_permute_ps(a.v, 0xb1)};
#elif defined(__AVX2__)
  return {_mm256_permute_ps(a.v, 0xb1)};
#elif defined(__ARM_NEON)
  return {vrev64q_f32(a.v)};
#else
  float from[V::W], to[V::W];
  store(from, a);
  for (int i = 0; i < V::W; i++) to[i] = from[i ^ 1];
  return load(to);
#endif
}

// The cosines and sines of `half` angles, up to the next whole vector.
static inline void turns(float position, const float* speeds, int64_t half, float* cosines, float* sines) {
  for (int64_t i = 0; i < half; i += V::W) {
    V speed = i + V::W <= half ? load(speeds + i) : load(speeds + i, static_cast<int>(half - i));
    V angle = set1(position) * speed;
    store(cosines + i, cos(angle));
    store(sines + i, sin(angle));
  }
}

// From the tables of half a row those of a row whose pairs are neighbours: (c0, c0, c1, c1, …) and
// (-s0, s0, -s1, s1, …). In place, hence backwards.
static inline void spread(int64_t half, float* cosines, float* sines) {
  for (int64_t i = half - 1; i >= 0; i--) {
    float c = cosines[i], s = sines[i];
    cosines[2 * i] = cosines[2 * i + 1] = c;
    sines[2 * i] = -s, sines[2 * i + 1] = s;
  }
}

// Pairs are neighbours. `dims` is even, so that the end of a row cuts no pair.
template <class E>
static inline void turn_neighbours(const typename E::T* x, typename E::T* y, int64_t dims,
                                   const float* cosines, const float* sines) {
  auto turned = [&](V v, int64_t i) {
    return fma(v, load(cosines + i), swap_neighbours(v) * load(sines + i));
  };
  int64_t i = 0;
  for (; i + V::W <= dims; i += V::W) E::store(y + i, turned(E::load(x + i), i));
  int rest = static_cast<int>(dims - i);
  if (rest) E::store(y + i, turned(E::load(x + i, rest), i), rest);
}

// Pairs are feature i of the first half and feature i of the second.
template <class E>
static inline void turn_halves(const typename E::T* x, typename E::T* y, int64_t half,
                               const float* cosines, const float* sines) {
  int64_t i = 0;
  for (; i + V::W <= half; i += V::W) {
    V a = E::load(x + i), b = E::load(x + half + i), c = load(cosines + i), s = load(sines + i);
    E::store(y + i, fma(a, c, -(b * s)));
    E::store(y + half + i, fma(a, s, b * c));
  }
  int rest = static_cast<int>(half - i);
  if (!rest) return;
  V a = E::load(x + i, rest), b = E::load(x + half + i, rest), c = load(cosines + i), s = load(sines + i);
  E::store(y + i, fma(a, c, -(b * s)), rest);
  E::store(y + half + i, fma(a, s, b * c), rest);
}

template <class E> static void rope_rows(const Rope& call) {
  using T = typename E::T;
  constexpr int64_t TASK = 1 << 14;  // elements
  const Rows& rows = call.rows;
  int64_t batch = rows.sizes[0], heads = rows.sizes[1], length = rows.sizes[2], columns = rows.columns;
  int64_t half = call.dims / 2, table = (call.dims + V::W) / V::W * V::W;
  // At one place, a position of one batch or of all batches together, stand the rows of so many heads.
  int64_t places = call.offset_step ? batch * length : length;
  int64_t standing = call.offset_step ? heads : batch * heads;
  // A task is some places, or a part of the rows that stand at one.
  int64_t fit = columns < TASK ? TASK / columns : 1;
  int64_t part = standing < fit ? standing : fit, parts = (standing + part - 1) / part;
  int64_t each = parts > 1 ? 1 : fit / part, groups = (places + each - 1) / each;
  double vectors = static_cast<double>(places) * static_cast<double>(standing * columns + 8 * half) / V::W;
  parallel(groups * parts, vectors * 2.0, [&](int64_t task) {
    float* cosines = static_cast<float*>(scratch(4, table * 8));
    float* sines = cosines + table;
    int64_t from = task % parts * part, to = from + part < standing ? from + part : standing;
    int64_t place = task / parts * each, end = place + each < places ? place + each : places;
    for (; place < end; place++) {
      int64_t b0 = place / length, l = place % length;
      float position = (static_cast<float>(l) + call.offsets[b0 * call.offset_step]) * call.scale;
      turns(position, call.speeds, half, cosines, sines);
      if (call.traditional) spread(half, cosines, sines);
      for (int64_t row = from; row < to; row++) {
        int64_t b = b0 + row / heads, h = row % heads;
        auto begin = [&](const int64_t* strides) { return b * strides[0] + h * strides[1] + l * strides[2]; };
        const T* x = static_cast<const T*>(rows.x) + begin(rows.strides);
        T* y = static_cast<T*>(rows.y) + begin(call.y_strides);
        if (call.traditional) turn_neighbours<E>(x, y, call.dims, cosines, sines);
        else turn_halves<E>(x, y, half, cosines, sines);
        int64_t rest = columns - call.dims;  // not turned
        if (rest && x != y) __builtin_memcpy(y + call.dims, x + call.dims, sizeof(T) * rest);
      }
    }
  });
}

static void rope(const Rope& call) {
  with(call.rows.type, [&](auto e) { rope_rows<decltype(e)>(call); });
}

}  // namespace qgraph::QGRAPH_ISA
