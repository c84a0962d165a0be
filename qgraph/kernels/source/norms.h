// rms_norm, layer_norm and softmax along the last axis.
//
// A row is read again for every pass over it, from the L1 cache for the lengths that models have. Everything
// is computed in f32 and rounded once.
#pragma once
#include "functions.h"
#include "pool.h"

namespace qgraph::QGRAPH_ISA {

// Where row `row` begins, in elements.
static inline int64_t begin_of(const Rows& rows, int64_t row) {
  int64_t begin = 0;
  for (int axis = 3; axis > 0; axis--) {
    int64_t size = rows.sizes[axis];
    if (size == 1) continue;
    begin += row % size * rows.strides[axis];
    row /= size;
  }
  return begin + row * rows.strides[0];
}

// f(number) for every row, many short ones a task; `nanoseconds` is the work of a vector.
template <class F> static inline void in_tasks(const Rows& rows, double nanoseconds, const F& f) {
  constexpr int64_t TASK = 1 << 15;  // elements
  int64_t n = rows.columns, count = 1;
  for (int64_t size : rows.sizes) count *= size;
  int64_t each = n < TASK ? TASK / n : 1, tasks = (count + each - 1) / each;
  double vectors = static_cast<double>(count) * static_cast<double>((n + V::W - 1) / V::W);
  parallel(tasks, vectors * nanoseconds, [&](int64_t task) {
    int64_t end = (task + 1) * each < count ? (task + 1) * each : count;
    for (int64_t row = task * each; row < end; row++) f(row);
  });
}

// f(x, y, n) for every row.
template <class E, class O, class F>
static inline void each_row(const Rows& rows, double nanoseconds, const F& f) {
  const int64_t n = rows.columns;
  in_tasks(rows, nanoseconds, [&](int64_t row) {
    f(static_cast<const typename E::T*>(rows.x) + begin_of(rows, row),
      static_cast<typename O::T*>(rows.y) + row * n, n);
  });
}

// All of x put into `a` by a = f(a, vector), in four chains that `both(a, b)` joins. The last vector of a row
// may be short: its other lanes are those of `start`.
template <class E, class F, class G>
static inline V fold(const typename E::T* x, int64_t n, V start, const F& f, const G& both) {
  constexpr int W = V::W;
  V a = start, b = start, c = start, d = start;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    a = f(a, E::load(x + i));
    b = f(b, E::load(x + i + W));
    c = f(c, E::load(x + i + 2 * W));
    d = f(d, E::load(x + i + 3 * W));
  }
  for (; i + W <= n; i += W) a = f(a, E::load(x + i));
  if (i < n) {
    float lanes[W];
    int rest = static_cast<int>(n - i);
    store(lanes, start);
    store(lanes, f(start, E::load(x + i, rest)), rest);
    b = both(b, load(lanes));
  }
  return both(both(a, b), both(c, d));
}

// The sum of f(0, vector) over x.
template <class E, class F> static inline float total(const typename E::T* x, int64_t n, const F& f) {
  return sum(fold<E>(x, n, zero(), f, [](V a, V b) { return a + b; }));
}

// y[i] = f(x[i], i), a vector at a time.
template <class E, class O, class F>
static inline void map(const typename E::T* x, typename O::T* y, int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + V::W <= n; i += V::W) O::store(y + i, f(E::load(x + i), i));
  int rest = static_cast<int>(n - i);
  if (rest) O::store(y + i, f(E::load(x + i, rest), i), rest);
}

// A weight or bias as floats, filled up to whole vectors; `absent` everywhere where there is none.
static inline const float* parameters(int slot, const void* given, Type type, int64_t n, float absent) {
  int64_t whole = (n + V::W - 1) / V::W * V::W;
  float* floats = static_cast<float*>(scratch(slot, whole * 4));
  for (int64_t i = given ? whole - V::W : 0; i < whole; i += V::W) store(floats + i, set1(absent));
  if (given) widen(type, given, floats, n);
  return floats;
}

template <class E, class O> static void rms_norm_rows(const Norm& c) {
  const float* weight = parameters(0, c.weight, c.parameter_type, c.rows.columns, 1.0f);
  each_row<E, O>(c.rows, 2.0, [&](auto* x, auto* y, int64_t n) {
    float squares = total<E>(x, n, [](V a, V v) { return fma(v, v, a); });
    V scale = set1(1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + c.eps));
    map<E, O>(x, y, n, [&](V v, int64_t i) { return v * scale * load(weight + i); });
  });
}

template <class E, class O> static void layer_norm_rows(const Norm& c) {
  const float* weight = parameters(0, c.weight, c.parameter_type, c.rows.columns, 1.0f);
  const float* bias = parameters(1, c.bias, c.parameter_type, c.rows.columns, -0.0f);
  each_row<E, O>(c.rows, 3.0, [&](auto* x, auto* y, int64_t n) {
    V mean = set1(total<E>(x, n, [](V a, V v) { return a + v; }) / static_cast<float>(n));
    float squares = total<E>(x, n, [&](V a, V v) { return fma(v - mean, v - mean, a); });
    V scale = set1(1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + c.eps));
    map<E, O>(x, y, n, [&](V v, int64_t i) {
      return fma((v - mean) * scale, load(weight + i), load(bias + i));
    });
  });
}

static void norm(const Norm& c) {
  auto rows = [&](auto e, auto o) {
    using E = decltype(e);
    using O = decltype(o);
    c.centred ? layer_norm_rows<E, O>(c) : rms_norm_rows<E, O>(c);
  };
  // The result has the type of x, or is f32 because of the weight.
  with(c.rows.type, [&](auto e) { c.y_type == c.rows.type ? rows(e, e) : rows(e, F32{}); });
}

// A row whose maximum is not finite has NaN in its result, as exp(inf - inf) says.
template <class E> static void softmax_rows(const Rows& rows) {
  constexpr bool IN_PLACE = sizeof(typename E::T) == 4;  // the exponentials, in f32, fit into y
  each_row<E, E>(rows, 8.0, [&](auto* x, auto* y, int64_t n) {
    auto larger = [](V a, V b) { return max(a, b); };
    V top = set1(largest(fold<E>(x, n, set1(-INFINITE), larger, larger)));
    float* powers;
    if constexpr (IN_PLACE) powers = y;
    else powers = static_cast<float*>(scratch(4, n * 4));
    map<E, F32>(x, powers, n, [&](V v, int64_t) { return exp(v - top); });
    V scale = set1(1.0f / total<F32>(powers, n, [](V a, V v) { return a + v; }));
    map<F32, E>(powers, y, n, [&](V v, int64_t) { return v * scale; });
  });
}

static void softmax(const Softmax& c) {
  with(c.rows.type, [&](auto e) { softmax_rows<decltype(e)>(c.rows); });
}

}  // namespace qgraph::QGRAPH_ISA
