// The largest number of every row, where it is, and the logarithm of the sum of the exponentials: what sampling asks
// of the logits of a whole vocabulary.
#pragma once
#include "norms.h"

namespace qgraph::QGRAPH_ISA {

// A NaN, of either, or the larger one.
static inline V nan_or_larger(V a, V b) { return select(a == a, max(a, b), a); }  // max: b where unordered

// NaN where one of the n numbers is NaN.
template <class E> static inline float top(const typename E::T* x, int64_t n) {
  float lanes[V::W];
  store(lanes, fold<E>(x, n, set1(-INFINITE), nan_or_larger, nan_or_larger));
  float top = lanes[0];
  for (float lane : lanes) top = top == top && !(lane <= top) ? lane : top;
  return top;
}

// The first place of `top`, which may be NaN.
template <class E> static inline uint32_t place_of(float top, const typename E::T* x, int64_t n) {
  constexpr int64_t BLOCK = 16 * V::W;
  const V wanted = set1(top), one = set1(1.0f);
  const bool nan = top != top;
  auto is_it = [&](V v) { return nan ? select(v == v, zero(), one) : select(v == wanted, one, zero()); };
  int64_t i = 0;
  for (; i + BLOCK <= n; i += BLOCK) {
    V found = zero();
    for (int64_t j = i; j < i + BLOCK; j += V::W) found = max(found, is_it(E::load(x + j)));
    if (largest(found) > 0) break;
  }
  for (; i < n; i++) {
    float lanes[V::W];
    store(lanes, is_it(E::load(x + i, 1)));
    if (lanes[0] > 0) break;
  }
  return static_cast<uint32_t>(i);
}

template <class E> static inline float log_sum_exp(const typename E::T* x, int64_t n) {
  const float most = top<E>(x, n);
  if (!(most - most == 0)) return most;  // an infinity, or NaN
  const V shift = set1(most);
  return most + std::log(total<E>(x, n, [&](V a, V v) { return a + exp(v - shift); }));
}

static void reduce(const Reduce& c) {
  const Rows& rows = c.rows;
  const int64_t n = rows.columns;
  with(rows.type, [&](auto e) {
    using E = decltype(e);
    in_tasks(rows, c.kind == Reduction::logsumexp ? 6.0 : 1.0, [&](int64_t row) {
      auto* x = static_cast<const typename E::T*>(rows.x) + begin_of(rows, row);
      auto* y = static_cast<typename E::T*>(rows.y) + row;
      if (c.kind == Reduction::argmax) static_cast<uint32_t*>(rows.y)[row] = place_of<E>(top<E>(x, n), x, n);
      else E::store(y, set1(c.kind == Reduction::max ? top<E>(x, n) : log_sum_exp<E>(x, n)), 1);
    });
  });
}

}  // namespace qgraph::QGRAPH_ISA
