// Attention of few rows (decoding): bound by reading keys and values, so each is read once for all rows of
// its head. A vector holds features.
//
// Keys at either end that no row sees are not read: a cache has room for more than it holds.
//
// Long sequences are cut into pieces of keys whose results are merged; where they are cut does not depend on
// the threads, so neither does a result.
#pragma once
#include <cfloat>
#include <cstring>
#include <utility>

#include "functions.h"
#include "pool.h"

namespace qgraph::QGRAPH_ISA {

constexpr float LOWEST = -FLT_MAX;     // the score of a key that is hidden
constexpr int FEW_ROWS = V::W;         // at most
constexpr int64_t PIECE = 512;         // keys of a task
constexpr int64_t CHUNK = 64;          // keys between two looks at the largest score
static_assert(PIECE % CHUNK == 0 && CHUNK % V::W == 0);

// n elements of the mask from `offset` on, as floats; of a bool one: 0 where hidden, 1 where seen.
static inline void mask_row(const Attention& a, int64_t offset, int64_t n, float* row) {
  int64_t step = a.mask_strides[3];
  if (a.mask_is_bool) {
    auto* from = static_cast<const uint8_t*>(a.mask) + offset;
    for (int64_t j = 0; j < n; j++) row[j] = from[j * step] ? 1.0f : 0.0f;
    return;
  }
  if (step == 1) return widen(a.mask_type, at(a.mask, a.mask_type, offset), row, n);
  with(a.mask_type, [&](auto e) {
    using E = decltype(e);
    auto* from = static_cast<const typename E::T*>(a.mask) + offset;
    for (int64_t j = 0; j < n; j++) row[j] = load1<E>(from + j * step);
  });
}

static inline V masked(V score, V mask, bool is_bool) {
  return is_bool ? select(mask == zero(), set1(LOWEST), score) : score + mask;
}

// What exponentials are relative to: the largest score, but 0 while all are -inf, so that they become 0.
static inline V finite_base(V highest) { return select(highest == set1(-INFINITE), zero(), highest); }

// Lane i of the result is the sum of parts[i], for W parts.
static inline V lane_sums(const V* parts) {
#if defined(__AVX512F__)
  // Pairs are added so that each sum moves to its own place: 16 vectors, 8, 4, 2, 1.
  __m512 s[8];
#pragma GCC unroll 16
  for (int i = 0; i < 8; i++) {
    __m512 a = parts[2 * i].v, b = parts[2 * i + 1].v;
    s[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));  // a b a b in every quarter
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++) {
    __m512d a = _mm512_castps_pd(s[2 * i]), b = _mm512_castps_pd(s[2 * i + 1]);
    __m512d low = _mm512_unpacklo_pd(a, b), high = _mm512_unpackhi_pd(a, b);
    s[i] = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  }
  // Each of s[0 … 3] holds four sums, a quarter of each in every quarter.
  auto fold = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return {fold(fold(s[0], s[1]), fold(s[2], s[3]))};
#else
  float lanes[V::W];
  for (int i = 0; i < V::W; i++) lanes[i] = sum(parts[i]);
  return load(lanes);
#endif
}

// The rows of one head of keys and values, and what a piece of its keys gave.
struct Few {
  const Attention& a;
  int64_t batch, kv_head, rows, group;
  int64_t dims, width;                 // dims and v_dims up to whole vectors
  const float* queries;                // [row][dims], scaled
  float *highest, *totals, *sums;      // [row], [row], [row][width]: not yet divided
};

static inline int64_t vectors_up(int64_t n) { return (n + V::W - 1) / V::W * V::W; }

// Scores of W keys from `key` on for R rows, without masks. Past the end the last key is read again.
template <class E, int R>
static inline void score_keys(const Few& t, int64_t row, int64_t key, int64_t end, float* scores) {
  using T = typename E::T;
  const Attention& a = t.a;
  const T* base = static_cast<const T*>(a.k) + t.batch * a.k_strides[0] + t.kv_head * a.k_strides[1];
  const float* queries = t.queries + row * t.dims;
  V parts[R][V::W];
  int64_t whole = a.dims / V::W * V::W;
  int rest = static_cast<int>(a.dims - whole);
  for (int j = 0; j < V::W; j += 4) {
    const T* k[4];
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) k[i] = base + (key + j + i < end ? key + j + i : end - 1) * a.k_strides[2];
    V dots[R][4];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int i = 0; i < 4; i++) dots[r][i] = zero();
    auto add = [&](const V* numbers, int64_t d) {
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        V query = load(queries + r * t.dims + d);
#pragma GCC unroll 16
        for (int i = 0; i < 4; i++) dots[r][i] = fma(query, numbers[i], dots[r][i]);
      }
    };
    for (int64_t d = 0; d < whole; d += V::W) {
      V numbers[4] = {E::load(k[0] + d), E::load(k[1] + d), E::load(k[2] + d), E::load(k[3] + d)};
      add(numbers, d);
    }
    if (rest) {
      V numbers[4];
#pragma GCC unroll 16
      for (int i = 0; i < 4; i++) numbers[i] = E::load(k[i] + whole, rest);
      add(numbers, whole);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int i = 0; i < 4; i++) parts[r][j + i] = dots[r][i];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) store(scores + r * CHUNK, lane_sums(parts[r]));
}

static inline void hide(const Few& t, int64_t row, int64_t key, int64_t n, float* scores) {
  const Attention& a = t.a;
  int64_t query = row / t.group, head = t.kv_head * t.group + row % t.group;
  if (a.mask) {
    float mask[CHUNK];
    const int64_t* s = a.mask_strides;
    mask_row(a, t.batch * s[0] + head * s[1] + query * s[2] + key * s[3], n, mask);
    for (int64_t j = 0; j < n; j += V::W) {
      int lanes = n - j < V::W ? static_cast<int>(n - j) : V::W;
      store(scores + j, masked(load(scores + j), load(mask + j, lanes), a.mask_is_bool));
    }
  }
  if (a.causal)
    for (int64_t j = 0; j < n; j++)
      if (key + j > query + a.keys - a.queries) scores[j] = LOWEST;
  for (int64_t j = n; j < CHUNK; j++) scores[j] = -INFINITE;  // keys that do not exist
}

// Scores to exponentials; what earlier scores must be multiplied with.
static inline float soften(float* scores, float& highest, float& total) {
  V high = set1(highest);
  for (int64_t j = 0; j < CHUNK; j += V::W) high = max(load(scores + j), high);
  float old = highest;
  highest = largest(high);
  float base = highest == -INFINITE ? 0.0f : highest, factor = 1.0f;
  if (old != base) {
    float lanes[V::W];
    store(lanes, exp(set1(old - base)));
    factor = lanes[0];
  }
  V all = zero();
  for (int64_t j = 0; j < CHUNK; j += V::W) {
    V e = exp(load(scores + j) - set1(base));
    store(scores + j, e);
    all = all + e;
  }
  total = total * factor + sum(all);
  return factor;
}

// sums[r][d …] = factor * sums + the exponentials times the values, for C vectors of features of R rows.
template <class E, int R, int C, bool WHOLE>
static inline void add_values(const Few& t, int64_t row, int64_t d, int lanes, const typename E::T* values,
                              int64_t n, const float* scores, const float* factors) {
  V sums[R][C];
  float* results = t.sums + row * t.width + d;
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) sums[r][c] = load(results + r * t.width + c * V::W) * set1(factors[r]);
  for (int64_t j = 0; j < n; j++, values += t.a.v_strides[2]) {
    V v[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++)
      v[c] = WHOLE ? E::load(values + c * V::W) : E::load(values + c * V::W, lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int c = 0; c < C; c++) sums[r][c] = fma(set1(scores[r * CHUNK + j]), v[c], sums[r][c]);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) store(results + r * t.width + c * V::W, sums[r][c]);
}

#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int COLUMNS = 4;  // vectors of features at once, with up to 4 rows: 16 of 32 registers hold sums
#else
constexpr int COLUMNS = 2;
#endif

template <class E, int R> static inline void attend_chunk(const Few& t, int64_t row, int64_t key, int64_t n) {
  using T = typename E::T;
  const Attention& a = t.a;
  float scores[R * CHUNK], factors[R];
  for (int64_t j = 0; j < n; j += V::W) score_keys<E, R>(t, row, key + j, key + n, scores + j);
  for (int r = 0; r < R; r++) {
    hide(t, row + r, key, n, scores + r * CHUNK);
    factors[r] = soften(scores + r * CHUNK, t.highest[row + r], t.totals[row + r]);
  }
  const T* v = static_cast<const T*>(a.v) + t.batch * a.v_strides[0] + t.kv_head * a.v_strides[1];
  v += key * a.v_strides[2];
  int64_t d = 0;
  for (; d + COLUMNS * V::W <= a.v_dims; d += COLUMNS * V::W)
    add_values<E, R, COLUMNS, true>(t, row, d, V::W, v + d, n, scores, factors);
  for (; d < a.v_dims; d += V::W) {
    int lanes = a.v_dims - d < V::W ? static_cast<int>(a.v_dims - d) : V::W;
    add_values<E, R, 1, false>(t, row, d, lanes, v + d, n, scores, factors);
  }
}

// Ask for rows of keys or values: those that come next are on their way while others are computed with.
static inline void ask_for_rows(const Few& t, const void* memory, const int64_t* strides, int64_t dims, int64_t key,
                                int64_t end) {
  const int64_t size = size_of(t.a.type), bytes = dims * size;
  const char* row = static_cast<const char*>(memory);
  row += (t.batch * strides[0] + t.kv_head * strides[1] + key * strides[2]) * size;
  for (; key < end; key++, row += strides[2] * size)
    for (int64_t i = 0; i < bytes; i += 64) ask_for(row + i);
}

static void attend_piece(const Few& t, int64_t first, int64_t end, bool begins) {
  const Attention& a = t.a;
  for (int64_t r = 0; r < t.rows; r++) {
    bool sink = a.sinks && begins;
    t.highest[r] = sink ? a.sinks[t.kv_head * t.group + r % t.group] : -INFINITE;
    t.totals[r] = sink && t.highest[r] != -INFINITE ? 1.0f : 0.0f;
  }
  std::memset(t.sums, 0, t.rows * t.width * 4);
  with(a.type, [&](auto e) {
    using E = decltype(e);
    for (int64_t key = first; key < end; key += CHUNK) {
      int64_t n = end - key < CHUNK ? end - key : CHUNK, next = key + n, r = 0;
      ask_for_rows(t, a.v, a.v_strides, a.v_dims, key, next);
      ask_for_rows(t, a.k, a.k_strides, a.dims, next, next + CHUNK < end ? next + CHUNK : end);
      for (; r + 4 <= t.rows; r += 4) attend_chunk<E, 4>(t, r, key, n);
      if (t.rows - r == 3) attend_chunk<E, 3>(t, r, key, n);
      if (t.rows - r == 2) attend_chunk<E, 2>(t, r, key, n);
      if (t.rows - r == 1) attend_chunk<E, 1>(t, r, key, n);
    }
  });
}

// The results of `pieces` pieces, `stride` floats apart, as one; written to y.
static void merge(const Few& t, int64_t pieces, int64_t stride) {
  const Attention& a = t.a;
  const int64_t* s = a.y_strides;
  for (int64_t r = 0; r < t.rows; r++) {
    float *highest = t.highest + r, *total = t.totals + r, *sums = t.sums + r * t.width;
    for (int64_t p = 1; p < pieces; p++) {
      float other = highest[p * stride], high = other > *highest || other != other ? other : *highest;
      float base = high == -INFINITE ? 0.0f : high, lanes[V::W];
      store(lanes, exp(set1(*highest - base)));
      float keep = lanes[0];
      store(lanes, exp(set1(other - base)));
      float take = lanes[0];
      *highest = high;
      *total = *total * keep + total[p * stride] * take;
      for (int64_t d = 0; d < t.width; d += V::W)
        store(sums + d, fma(load(sums + d), set1(keep), load(sums + p * stride + d) * set1(take)));
    }
    V share = set1(1.0f / *total);
    for (int64_t d = 0; d < t.width; d += V::W) store(sums + d, load(sums + d) * share);
    int64_t head = t.kv_head * t.group + r % t.group;
    narrow(a.type, sums, at(a.y, a.type, t.batch * s[0] + head * s[1] + r / t.group * s[2]), a.v_dims);
  }
}

// The keys from the first that a row sees to behind the last: the weights of hidden ones are zeros, but for a row
// that sees none and so has the average of all.
static std::pair<int64_t, int64_t> seen(const Attention& a) {
  if (!a.mask || !a.mask_is_bool) return {0, a.keys};
  auto* mask = static_cast<const uint8_t*>(a.mask);
  const int64_t* s = a.mask_strides;
  int64_t low = a.keys, high = 0;
  auto count = [&](int axis, int64_t size) { return s[axis] ? size : 1; };
  for (int64_t b = 0; b < count(0, a.batch); b++)
    for (int64_t h = 0; h < count(1, a.heads); h++)
      for (int64_t q = 0; q < count(2, a.queries); q++) {
        auto* row = mask + b * s[0] + h * s[1] + q * s[2];
        int64_t first = 0, end = a.keys;
        while (first < end && !row[first * s[3]]) first++;
        while (first < end && !row[(end - 1) * s[3]]) end--;
        if (first == end) return {0, a.keys};
        low = first < low ? first : low, high = end > high ? end : high;
      }
  return {low, high};
}

static void attend_few(const Attention& a) {
  const auto [low, high] = seen(a);
  int64_t group = a.heads / a.kv_heads, rows = a.queries * group, problems = a.batch * a.kv_heads;
  int64_t pieces = (high - low + PIECE - 1) / PIECE, dims = vectors_up(a.dims), width = vectors_up(a.v_dims);
  int64_t stride = rows * width + 2 * vectors_up(rows);  // floats of one piece's results
  auto* shared = static_cast<float*>(scratch(0, problems * (rows * dims + pieces * stride) * 4));
  float* results = shared + problems * rows * dims;
  auto few = [&](int64_t problem, int64_t piece) {
    float* memory = results + (problem * pieces + piece) * stride;
    float* highest = memory + rows * width;
    return Few{a, problem / a.kv_heads, problem % a.kv_heads, rows, group, dims, width,
               shared + problem * rows * dims, highest, highest + vectors_up(rows), memory};
  };
  std::memset(shared, 0, problems * rows * dims * 4);
  for (int64_t i = 0; i < problems * rows; i++) {
    int64_t problem = i / rows, r = i % rows, head = problem % a.kv_heads * group + r % group;
    const int64_t* s = a.q_strides;
    float* query = shared + i * dims;
    int64_t offset = problem / a.kv_heads * s[0] + head * s[1] + r / group * s[2];
    widen(a.type, at(a.q, a.type, offset), query, a.dims);
    for (int64_t d = 0; d < dims; d += V::W) store(query + d, load(query + d) * set1(a.scale));
  }
  double bytes = 1.0 * problems * (high - low) * (a.dims + a.v_dims) * size_of(a.type);
  double products = 1.0 * problems * rows * (high - low) * (a.dims + a.v_dims);
  parallel(problems * pieces, bytes / 15 + products / 30, [&, low = low, high = high](int64_t i) {
    int64_t piece = i % pieces, first = low + piece * PIECE, end = first + PIECE < high ? first + PIECE : high;
    attend_piece(few(i / pieces, piece), first, end, piece == 0);
  });
  double merged = 1.0 * problems * rows * pieces * width;
  parallel(problems, merged / 5, [&](int64_t i) { merge(few(i, 0), pieces, stride); });
}

}  // namespace qgraph::QGRAPH_ISA
