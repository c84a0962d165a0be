// Many rows of rounded activations: weights rearranged in panels, products in register blocks.
//
// A panel is PANEL rows of w as bytes, in quads: [k / 4][PANEL][4]. Lanes are rows of w, the quads of x are
// broadcast.
#pragma once

namespace qgraph::QGRAPH_ISA::int8 {

// TILE rows of x by PANEL rows of w are one register block.
#if defined(__AVX512F__)
constexpr int TILE = 6, PANEL_VECTORS = 2;
#elif defined(__AVX2__) || defined(__ARM_NEON)
constexpr int TILE = 4, PANEL_VECTORS = 2;
#else
constexpr int TILE = 2, PANEL_VECTORS = 1;
#endif
constexpr int PANEL = PANEL_VECTORS * V::W;

struct Panel {
  uint8_t* quads;
  float *scales, *biases;  // [group][PANEL]
};

// n weights of a row of 32-bit words from the kth on, k a multiple of 32, as bytes.
static inline Bytes weights(const uint8_t* row, int bits, int64_t k, int n) {
  row += k / 8 * bits;
  if (bits == 4) return nibbles(row, n / 2);
  if (bits == 8) return load_bytes(row, n);
  uint8_t bytes[Bytes::W];
  unpack(row, bits, bytes, n);
  return load_bytes(bytes, n);
}

// `of_groups` (scales, or biases) of rows n to n + count as columns, one row a group; zeros for the rest of
// the panel.
static void pack_groups(const Packed& w, const void* of_groups, int64_t n, int count, float* to) {
  auto* rows = static_cast<float*>(scratch(6, (PANEL * w.groups() + V::W) * 4));
  widen(w.scales_type, at(of_groups, w.scales_type, n * w.groups()), rows, count * w.groups());
  for (int64_t g = 0; g < w.groups(); g += V::W)
    for (int side = 0; side < PANEL; side += V::W) {
      I r[V::W];
      for (int i = 0; i < V::W; i++)
        r[i] = side + i < count ? bits(load(rows + (side + i) * w.groups() + g)) : seti(0);
      transpose(r);
      for (int i = 0; i < V::W && g + i < w.groups(); i++)
        store(to + (g + i) * PANEL + side, from_bits(r[i]));
    }
}

// Bytes::W weights (`left` of them are) of `count` of V::W rows from the kth on, as quads.
static inline void pack_quads(const Packed& w, const uint8_t* rows, int count, int64_t k, int left,
                              uint8_t* to) {
  I r[V::W];
#pragma GCC unroll 16
  for (int i = 0; i < V::W; i++) {
    Bytes b = i < count ? weights(rows + i * w.row_bytes(), w.bits, k, left) : Bytes{};
    std::memcpy(&r[i], &b, sizeof b);
  }
  transpose(r);
#pragma GCC unroll 16
  for (int i = 0; i < V::W; i++)
    if (4 * i < left) std::memcpy(to + i * PANEL * 4, &r[i], sizeof r[i]);
}

static void pack(const Packed& w, int64_t n, int count, const Panel& to) {
  const uint8_t* rows = reinterpret_cast<const uint8_t*>(w.words) + n * w.row_bytes();
  for (int64_t k = 0; k < w.columns; k += Bytes::W) {
    const int left = w.columns - k < Bytes::W ? static_cast<int>(w.columns - k) : Bytes::W;
    for (int side = 0; side < PANEL; side += V::W) {
      uint8_t* quads = to.quads + (k / 4 * PANEL + side) * 4;
      pack_quads(w, rows + side * w.row_bytes(), count - side, k, left, quads);
    }
  }
  pack_groups(w, w.scales, n, count, to.scales);
  pack_groups(w, w.biases, n, count, to.biases);
}

// Rows m to m + R of x by a panel of weights of at most `Bits` bits.
template <int Bits, int R>
static void multiply_tile(const QuantizedMatmul& p, const Rounded& x, const Panel& w, int64_t m,
                          float (*out)[PANEL]) {
  constexpr int U = PANEL_VECTORS;
  const int8_t* q = x.q + m * x.stride;
  const uint8_t* quads = w.quads;
  const float *scales = x.scales + m, *sums_of_q = x.sums + m, *w_scales = w.scales, *w_biases = w.biases;
  V sums[R][U];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) sums[i][u] = zero();
  for (int64_t k = x.block; k <= p.k; k += x.block) {
    Dots<Bits> dots[R][U];
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) dots[i][u].clear();
    for (int half = 0; half < x.block; half += 32) {
#pragma GCC unroll 2
      for (int j = 0; j < 8; j++, quads += PANEL * 4, q += 4) {
        Bytes v[U];
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) v[u] = load_bytes(quads + u * Bytes::W);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
          Bytes four = quad(q + i * x.stride);
#pragma GCC unroll 4
          for (int u = 0; u < U; u++) dots[i][u].add(v[u], four);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) dots[i][u].fold();
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      V scale = set1(scales[i]), sum_of_q = set1(sums_of_q[i]);
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) {
        sums[i][u] = fma(sum_of_q, load(w_biases + u * V::W), sums[i][u]);
        sums[i][u] = fma(to_float(dots[i][u].total) * scale, load(w_scales + u * V::W), sums[i][u]);
      }
    }
    scales += x.block_step, sums_of_q += x.block_step;
    if ((k & (p.w.group - 1)) == 0) w_scales += PANEL, w_biases += PANEL;
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) store(out[i] + u * V::W, sums[i][u]);
}

// The same with TILE / 2 to TILE rows.
template <int Bits, int R = TILE>
static void multiply_tile(int rows, const QuantizedMatmul& p, const Rounded& x, const Panel& w, int64_t m,
                          float (*out)[PANEL]) {
  if (rows == R) return multiply_tile<Bits, R>(p, x, w, m, out);
  if constexpr (R > TILE / 2) multiply_tile<Bits, R - 1>(rows, p, x, w, m, out);
}

static void many_rows(const QuantizedMatmul& p) {
  static_assert(FEW + 1 >= TILE);  // so that nearly equal tiles are no lower than TILE / 2
  Rounded x = round_rows(p, Order::many);
  // A task is a panel and a part of the rows; with few panels the rows are divided, though each part packs
  // the panel again.
  int64_t panels = (p.n + PANEL - 1) / PANEL, parts = 1;
  while (panels * parts < 8 * threads() && p.m / (parts + 1) >= 20 * TILE) parts++;
  double nanoseconds = static_cast<double>(p.m) * p.n * p.k / 150;
  parallel(panels * parts, nanoseconds, [&](int64_t task) {
    int64_t n = task / parts * PANEL, m = task % parts * p.m / parts;
    const int64_t end = (task % parts + 1) * p.m / parts;
    const int count = p.n - n < PANEL ? static_cast<int>(p.n - n) : PANEL;
    Panel panel;
    panel.quads = static_cast<uint8_t*>(scratch(4, p.k * PANEL));
    panel.scales = static_cast<float*>(scratch(5, p.w.groups() * PANEL * 8));
    panel.biases = panel.scales + p.w.groups() * PANEL;
    pack(p.w, n, count, panel);
    // Tiles of nearly equal height: a low one would wait for its few sums.
    for (int64_t tiles = (end - m + TILE - 1) / TILE; tiles > 0; tiles--) {
      const int height = static_cast<int>((end - m + tiles - 1) / tiles);
      float out[TILE][PANEL];
      if (p.w.bits <= 4) multiply_tile<4>(height, p, x, panel, m, out);
      else multiply_tile<8>(height, p, x, panel, m, out);
      for (int i = 0; i < height; i++, m++) {
        int64_t row = p.y_rows ? p.y_rows[m] : m;
        narrow(p.y_type, out[i], at(p.y, p.y_type, row * p.y_stride + n), count);
      }
    }
  });
}

}  // namespace qgraph::QGRAPH_ISA::int8
