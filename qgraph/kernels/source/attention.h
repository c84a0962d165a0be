// softmax(scale q kᵀ + mask) v in one pass over the keys, with a running maximum and sum for every row.
//
// The query heads that share a head of keys and values are the rows of one problem: row r is query r / group
// of head r % group, so that rows of one position lie together and keys and values are read once for them.
// Few rows (decoding) go through attention_few.h: a vector holds features. Many rows (a prompt) are handled
// here: a vector holds rows, so the softmax over keys needs no sums across lanes, and keys and values are
// used in the layout they have, one number broadcast at a time.
//
// Masks: a key that a bool mask or causality hides has the score LOWEST, as in MLX: a row that sees nothing
// averages all values, and only a key skipped as a whole block costs nothing. An additive mask of -inf gives
// exactly 0, and a row of nothing else 0 / 0 = NaN, also as in MLX.
#pragma once
#include <cfloat>
#include <cstring>

#include "attention_few.h"
#include "functions.h"
#include "pool.h"

namespace qgraph::QGRAPH_ISA {

constexpr int PANEL = 2 * V::W;        // rows whose scores lie side by side, in two vectors
constexpr int TASK_ROWS = 64;          // of a task: a multiple of PANEL on every set
constexpr int BLOCK_KEYS = 64;         // keys handled at once: scores and values of a block stay in L1 and L2
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int TILE = 8;                // of 32 registers, 2 * TILE hold sums
#else
constexpr int TILE = 4;                // of 16
#endif
static_assert(TASK_ROWS % PANEL == 0 && BLOCK_KEYS % TILE == 0);

// out[i][lane] (+)= sum over s of numbers[i * ROW + s * STEP] lanes[s][lane] for i < TILE; one of the two
// strides is `stride`, the other 1.
template <bool ROWS_APART, bool ADD>
static inline void tile(const float* numbers, int64_t stride, const float* lanes, int64_t steps, float* out) {
  V sums[TILE][2];
#pragma GCC unroll 16
  for (int i = 0; i < TILE; i++)
#pragma GCC unroll 16
    for (int v = 0; v < 2; v++) sums[i][v] = ADD ? load(out + i * PANEL + v * V::W) : zero();
  for (int64_t s = 0; s < steps; s++) {
    V low = load(lanes), high = load(lanes + V::W);
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) {
      V number = set1(ROWS_APART ? numbers[i * stride] : numbers[i]);
      sums[i][0] = fma(number, low, sums[i][0]);
      sums[i][1] = fma(number, high, sums[i][1]);
    }
    lanes += PANEL;
    numbers += ROWS_APART ? 1 : stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < TILE; i++)
#pragma GCC unroll 16
    for (int v = 0; v < 2; v++) store(out + i * PANEL + v * V::W, sums[i][v]);
}

static inline int64_t tiles_up(int64_t n) { return (n + TILE - 1) / TILE * TILE; }

// A task's rows of one head of keys and values, and the memory it works in.
struct Block {
  const Attention& a;
  int64_t batch, kv_head, first, rows;  // rows first … first + rows - 1
  int64_t group, width;                 // query heads a kv head; v_dims in whole tiles
  float *queries, *keys, *values;       // [panel][dims][PANEL], [key][dims], [key][width]
  float *scores, *masks;                // [key][PANEL] of one panel
  float *sums;                          // [panel][width][PANEL]: the results, not yet divided
  float *highest, *totals, *limits;     // [row]: largest score, sum of exponentials, last key in sight

  int64_t query(int64_t r) const { return (first + r) / group; }
  int64_t head(int64_t r) const { return kv_head * group + (first + r) % group; }
  int64_t panel_rows(int p) const { return rows - p * PANEL < PANEL ? rows - p * PANEL : PANEL; }
  // How many keys at least one of the rows from `r` to before `end` needs.
  int64_t visible(int64_t r, int64_t end) const {
    int64_t past = a.keys - a.queries;
    if (!a.causal || query(r) + past < 0) return a.keys;  // a row that sees nothing averages all
    int64_t seen = query(end - 1) + past + 1;
    return seen < a.keys ? seen : a.keys;
  }
};

static inline Block block(const Attention& a, int64_t batch, int64_t kv_head, int64_t first) {
  int64_t group = a.heads / a.kv_heads, all = a.queries * group, width = tiles_up(a.v_dims);
  Block t{a, batch, kv_head, first, all - first < TASK_ROWS ? all - first : TASK_ROWS, group, width,
          nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  float** parts[] = {&t.queries, &t.keys, &t.values,  &t.scores, &t.masks,
                     &t.sums,    &t.highest, &t.totals, &t.limits};
  int64_t sizes[] = {TASK_ROWS * a.dims,   BLOCK_KEYS * a.dims, BLOCK_KEYS * width, BLOCK_KEYS * PANEL,
                     BLOCK_KEYS * PANEL, TASK_ROWS * width,   TASK_ROWS,          TASK_ROWS, TASK_ROWS};
  int64_t floats = 0;
  for (int64_t& size : sizes) floats += size = (size + 15) / 16 * 16;
  float* memory = static_cast<float*>(scratch(4, floats * 4));
  for (int i = 0; i < 9; memory += sizes[i++]) *parts[i] = memory;
  return t;
}

static void start(const Block& t) {
  const Attention& a = t.a;
  float* row = t.sums;  // as a place for one row
  std::memset(t.queries, 0, TASK_ROWS * a.dims * 4);
  if (a.dims > TASK_ROWS * t.width) row = static_cast<float*>(scratch(5, a.dims * 4));
  for (int64_t r = 0; r < t.rows; r++) {
    const int64_t* s = a.q_strides;
    widen(a.type, at(a.q, a.type, t.batch * s[0] + t.head(r) * s[1] + t.query(r) * s[2]), row, a.dims);
    float* to = t.queries + r / PANEL * PANEL * a.dims + r % PANEL;
    for (int64_t d = 0; d < a.dims; d++) to[d * PANEL] = row[d] * a.scale;
  }
  std::memset(t.sums, 0, TASK_ROWS * t.width * 4);
  for (int64_t r = 0; r < TASK_ROWS; r++) {
    bool sink = a.sinks && r < t.rows;
    t.highest[r] = sink ? a.sinks[t.head(r)] : -INFINITE;
    t.totals[r] = sink && t.highest[r] != -INFINITE ? 1.0f : 0.0f;
    t.limits[r] = r < t.rows ? static_cast<float>(t.query(r) + a.keys - a.queries) : FLT_MAX;
  }
}

// Keys and values from `key` on as floats, with zeros up to whole tiles.
static void fetch(const Block& t, int64_t key, int64_t n) {
  const Attention& a = t.a;
  const int64_t *k = a.k_strides, *v = a.v_strides;
  for (int64_t j = 0; j < n; j++) {
    int64_t from_k = t.batch * k[0] + t.kv_head * k[1] + (key + j) * k[2];
    int64_t from_v = t.batch * v[0] + t.kv_head * v[1] + (key + j) * v[2];
    float* value = t.values + j * t.width;
    widen(a.type, at(a.k, a.type, from_k), t.keys + j * a.dims, a.dims);
    widen(a.type, at(a.v, a.type, from_v), value, a.v_dims);
    for (int64_t d = a.v_dims; d < t.width; d++) value[d] = 0.0f;
  }
  std::memset(t.keys + n * a.dims, 0, (tiles_up(n) - n) * a.dims * 4);
}

// The mask of a panel's rows as floats, turned so that rows are lanes.
static void turn_mask(const Block& t, int p, int64_t key, int64_t n) {
  const Attention& a = t.a;
  const int64_t* s = a.mask_strides;
  float row[BLOCK_KEYS];
  if (t.panel_rows(p) < PANEL) std::memset(t.masks, 0, n * PANEL * 4);
  for (int64_t r = 0; r < t.panel_rows(p); r++) {
    int64_t q = p * PANEL + r;
    mask_row(a, t.batch * s[0] + t.head(q) * s[1] + t.query(q) * s[2] + key * s[3], n, row);
    for (int64_t j = 0; j < n; j++) t.masks[j * PANEL + r] = row[j];
  }
}

// The scores of a panel, masked; `diagonal`: causality hides some of them.
static void score(const Block& t, int p, int64_t key, int64_t n, bool diagonal) {
  const Attention& a = t.a;
  const float* queries = t.queries + p * PANEL * a.dims;
  for (int64_t j = 0; j < n; j += TILE)
    tile<true, false>(t.keys + j * a.dims, a.dims, queries, a.dims, t.scores + j * PANEL);
  if (a.mask) {
    turn_mask(t, p, key, n);
    for (int64_t i = 0; i < n * PANEL; i += V::W)
      store(t.scores + i, masked(load(t.scores + i), load(t.masks + i), a.mask_is_bool));
  }
  if (diagonal)
    for (int v = 0; v < 2; v++) {
      V limit = load(t.limits + p * PANEL + v * V::W);
      for (int64_t j = 0; j < n; j++) {
        float* scores = t.scores + j * PANEL + v * V::W;
        store(scores, select(set1(static_cast<float>(key + j)) <= limit, load(scores), set1(LOWEST)));
      }
    }
}

// Scores to exponentials relative to the largest so far; what was summed before is brought to it.
static void soften(const Block& t, int p, int64_t n) {
  V factors[2];
  bool same = true;
  for (int v = 0; v < 2; v++) {
    float *highest = t.highest + p * PANEL + v * V::W, *totals = t.totals + p * PANEL + v * V::W;
    float* scores = t.scores + v * V::W;
    V old = load(highest), high = old, other = old;
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) {
      high = max(load(scores + j * PANEL), high);
      other = max(load(scores + (j + 1) * PANEL), other);
    }
    if (j < n) high = max(load(scores + j * PANEL), high);
    high = max(other, high);
    V base = finite_base(high), factor = exp(old - base), total = load(totals) * factor;
    for (j = 0; j < n; j++) {
      V e = exp(load(scores + j * PANEL) - base);
      store(scores + j * PANEL, e);
      total = total + e;
    }
    store(highest, high);
    store(totals, total);
    factors[v] = factor;
    same = same && sum(select(factor == set1(1.0f), zero(), set1(1.0f))) == 0.0f;
  }
  if (same) return;
  float* sums = t.sums + p * PANEL * t.width;
  for (int64_t d = 0; d < t.width; d++)
    for (int v = 0; v < 2; v++) {
      float* sum = sums + d * PANEL + v * V::W;
      store(sum, load(sum) * factors[v]);
    }
}

static void finish(const Block& t) {
  const Attention& a = t.a;
  float* row = t.keys;
  if (a.v_dims > BLOCK_KEYS * a.dims) row = static_cast<float*>(scratch(5, a.v_dims * 4));
  const int64_t* s = a.y_strides;
  for (int64_t r = 0; r < t.rows; r++) {
    const float* from = t.sums + r / PANEL * PANEL * t.width + r % PANEL;
    float share = 1.0f / t.totals[r];
    for (int64_t d = 0; d < a.v_dims; d++) row[d] = from[d * PANEL] * share;
    narrow(a.type, row, at(a.y, a.type, t.batch * s[0] + t.head(r) * s[1] + t.query(r) * s[2]), a.v_dims);
  }
}

static void attend_block(const Block& t) {
  const Attention& a = t.a;
  start(t);
  int64_t end = t.visible(0, t.rows), past = a.keys - a.queries;
  for (int64_t key = 0; key < end; key += BLOCK_KEYS) {
    int64_t n = end - key < BLOCK_KEYS ? end - key : BLOCK_KEYS;
    fetch(t, key, n);
    for (int p = 0; p * PANEL < t.rows; p++) {
      int64_t r = p * PANEL, left = t.visible(r, r + t.panel_rows(p)) - key, seen = left < n ? left : n;
      if (seen <= 0) continue;
      score(t, p, key, seen, a.causal && key + seen - 1 > t.query(r) + past);
      soften(t, p, seen);
      float* sums = t.sums + p * PANEL * t.width;
      for (int64_t d = 0; d < t.width; d += TILE)
        tile<false, true>(t.values + d, t.width, t.scores, seen, sums + d * PANEL);
    }
  }
  finish(t);
}

static void attention(const Attention& a) {
  int64_t rows = a.queries * (a.heads / a.kv_heads), problems = a.batch * a.kv_heads;
  if (rows <= FEW_ROWS) return attend_few(a);
  int64_t blocks = (rows + TASK_ROWS - 1) / TASK_ROWS;
  double products = 1.0 * a.batch * a.heads * a.queries * a.keys * (a.dims + a.v_dims + 32);
  parallel(problems * blocks, products / 30, [&](int64_t i) {
    // The last queries first: under causality they have the most keys.
    int64_t first = (blocks - 1 - i / problems) * TASK_ROWS;
    attend_block(block(a, i % problems / a.kv_heads, i % a.kv_heads, first));
  });
}

}  // namespace qgraph::QGRAPH_ISA
