// Few rows of rounded activations: dot products along k, with 4-bit weights read in place.
#pragma once

namespace qgraph::QGRAPH_ISA::int8 {

constexpr int FEW = 6;        // rows of x for which rearranging the weights does not pay
constexpr int TOGETHER = 4;   // of them at once
constexpr int CHUNK = 16;     // rows of w whose scales are widened, and results written, together

// Rows of w, in nibbles or bytes, and what belongs to them as floats, one a block.
struct Weights {
  const uint8_t* row;
  const float *scales, *biases;
  int64_t bytes, blocks;  // of a row

  void move() { row += bytes, scales += blocks, biases += blocks; }
};

// A row of w by C rows of x from row m on: out[c * CHUNK].
//
// V::W blocks share a vector of scales; of a vector of sums, a run of lanes belongs to one block.
template <int Bits, int Block, int C>
static inline void dot(const Weights& w, const Rounded& x, int64_t m, float* out) {
  constexpr int step = Bits == 4 ? 2 * Bytes::W : Bytes::W;  // weights of a vector
  constexpr int run = Block * V::W / step, steps = V::W * Block / step;
  const int8_t* q = x.q + m * x.stride;
  const uint8_t* from = w.row;
  V sums[C], more[C], scales[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; c++) sums[c] = more[c] = zero();
  auto multiply = [&](Bytes b, const Spread<run>& spread, V* to) __attribute__((always_inline)) {
    Bytes low = Bits == 4 ? low_nibbles(b) : b;
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      Dots<Bits> dots;
      dots.clear();
      dots.add(low, load_bytes(q + c * x.stride));
      if constexpr (Bits == 4) dots.add(high_nibbles(b), load_bytes(q + c * x.stride + Bytes::W));
      dots.fold();
      to[c] = fma(to_float(dots.total), spread.of(scales[c]), to[c]);
    }
    q += step, from += Bytes::W;
  };
  for (int64_t b = 0; b < w.blocks; b += V::W) {
    const bool whole = w.blocks - b >= V::W;
    const int count = whole ? V::W : static_cast<int>(w.blocks - b);
    V scale = whole ? load(w.scales + b) : load(w.scales + b, count);
    V bias = whole ? load(w.biases + b) : load(w.biases + b, count);
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      scales[c] = scale * load(x.scales + (m + c) * x.row_step + b);
      sums[c] = fma(bias, load(x.sums + (m + c) * x.row_step + b), sums[c]);
    }
    Spread<run> spread;
    if (whole) {
#pragma GCC unroll 2
      for (int i = 0; i < steps; i += 2) {
        ask_for(from + AHEAD);
        multiply(load_bytes(from), spread, sums);
        spread.next();
        ask_for(from + AHEAD);
        multiply(load_bytes(from), spread, more);
        spread.next();
      }
    } else {
      for (int left = count * Block; left > 0; left -= step, spread.next())
        multiply(load_bytes(from, Bits == 4 ? left / 2 : left), spread, sums);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; c++) out[c * CHUNK] = sum(sums[c] + more[c]);
}

template <int Bits, int Block, int C>
static void dots(Weights w, const Rounded& x, int64_t m, int count, float* out) {
  for (int i = 0; i < count; i++, w.move()) dot<Bits, Block, C>(w, x, m, out + i);
}

template <int Bits, int Block>
static void dots(int c, const Weights& w, const Rounded& x, int64_t m, int count, float* out) {
  if (c == 1) return dots<Bits, Block, 1>(w, x, m, count, out);
  if (c == 2) return dots<Bits, Block, 2>(w, x, m, count, out);
  if (c == 3) return dots<Bits, Block, 3>(w, x, m, count, out);
  return dots<Bits, Block, TOGETHER>(w, x, m, count, out);
}

// Columns n to n + count of y.
static void few_columns(const QuantizedMatmul& p, const Rounded& x, int64_t n, int count) {
  const int bits = p.w.bits;
  const int64_t blocks = p.k / x.block;
  auto* scales = static_cast<float*>(scratch(5, 2 * CHUNK * blocks * 4));
  float* biases = scales + CHUNK * blocks;
  widen_groups(p.w, p.w.scales, n, count, scales, blocks);
  widen_groups(p.w, p.w.biases, n, count, biases, blocks);
  ask_for_scales(p.w, n + CHUNK, CHUNK);
  const auto* rows = reinterpret_cast<const uint8_t*>(p.w.words) + n * p.w.row_bytes();
  Weights w = {rows, scales, biases, p.w.row_bytes(), blocks};
  float out[TOGETHER * CHUNK];
  for (int64_t m = 0; m < p.m;) {
    int c = p.m - m < TOGETHER ? static_cast<int>(p.m - m) : TOGETHER;
    if (bits == 4) x.block == 32 ? dots<4, 32>(c, w, x, m, count, out) : dots<4, 64>(c, w, x, m, count, out);
    else x.block == 32 ? dots<8, 32>(c, w, x, m, count, out) : dots<8, 64>(c, w, x, m, count, out);
    for (int i = 0; i < c; i++, m++) {
      int64_t row = p.y_rows ? p.y_rows[m] : m;
      narrow(p.y_type, out + i * CHUNK, at(p.y, p.y_type, row * p.y_stride + n), count);
    }
  }
}

static void few_rows(const QuantizedMatmul& p) {
  Rounded x = round_rows(p, p.w.bits == 4 ? Order::few_parted : Order::few);
  const int64_t chunks = (p.n + CHUNK - 1) / CHUNK;
  const int64_t each = TASK_BYTES / (CHUNK * p.w.row_bytes()) + 1;  // of a task
  double nanoseconds = static_cast<double>(p.w.row_bytes()) * p.n * (p.m + 1) / 50;
  parallel((chunks + each - 1) / each, nanoseconds, [&](int64_t task) {
    const int64_t end = (task + 1) * each * CHUNK < p.n ? (task + 1) * each * CHUNK : p.n;
    for (int64_t n = task * each * CHUNK; n < end; n += CHUNK)
      few_columns(p, x, n, static_cast<int>(end - n < CHUNK ? end - n : CHUNK));
  });
}

}  // namespace qgraph::QGRAPH_ISA::int8
