// Products with packed weights and activations rounded to 8 bits: an option, faster and less exact.
//
// Every row of x is rounded in blocks of 64 numbers (32 where the weights' groups are so small), each by its
// own scale: x = scale * q, q within -127..127, ties to even. What then is summed is exact within a block,
// and the blocks are added in f32:
//
//     y[m, n] = sum over blocks of  w_scale * scale * (sum of w_q * q)  +  w_bias * (scale * (sum of q))
//
// The last term takes the rounded x too: w_q is unsigned, so with the exact x there the error would be that
// of a far larger number. A block with an infinity or a NaN gives NaN.
#pragma once
#include "formats.h"
#include "int8_bytes.h"
#include "pool.h"

namespace qgraph::QGRAPH_ISA::int8 {

// The rows of x: q in rows of `stride` bytes; scales and sums (scale * sum of q) of block b of row m at
// m * row_step + b * block_step.
struct Rounded {
  int block;
  int8_t* q;
  float *scales, *sums;
  int64_t stride, row_step, block_step;
};

// For few rows of x blocks follow each other, with zeros behind the last; for many rows of x the rows do.
// Parted: of each 2 Bytes::W numbers those at even places come first, which belong to the low nibbles of
// Bytes::W bytes of weights, then those at odd places.
enum class Order { few, few_parted, many };

constexpr float SMALLEST = 1e-36f;  // a block of smaller numbers counts as zeros: 127 / x would overflow

template <class E>
static inline void round_block(const typename E::T* x, int block, int8_t* q, float* scale, float* sum_of_q) {
  V top = zero(), odd = zero();
  for (int i = 0; i < block; i += V::W) {
    V v = E::load(x + i);
    top = max(abs(v), top);
    odd = fma(v, zero(), odd);  // NaN where one is not finite
  }
  float greatest = largest(top);
  V inverse = set1(greatest > SMALLEST ? 127.0f / greatest : 0.0f);
  I total = seti(0);
  for (int i = 0; i < block; i += V::W) {
    I rounded = to_int(E::load(x + i) * inverse);
    store_as_bytes(q + i, rounded);
    total = total + rounded;
  }
  *scale = greatest / 127.0f + sum(odd);
  *sum_of_q = *scale * sum(to_float(total));
}

static void round_row(const QuantizedMatmul& p, const Rounded& r, int64_t m, Order order) {
  int8_t* q = r.q + m * r.stride;
  float *scales = r.scales + m * r.row_step, *sums = r.sums + m * r.row_step;
  int64_t row = p.x_rows ? p.x_rows[m] : m, blocks = p.k / r.block;
  with(p.x_type, [&](auto e) {
    using E = decltype(e);
    auto* x = static_cast<const typename E::T*>(at(p.x, p.x_type, row * p.x_stride));
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t k = b * r.block, i = b * r.block_step;
      round_block<E>(x + k, r.block, q + k, scales + i, sums + i);
    }
  });
  if (order == Order::many) return;
  std::memset(q + p.k, 0, r.stride - p.k);
  std::memset(scales + blocks, 0, (r.row_step - blocks) * 4);
  std::memset(sums + blocks, 0, (r.row_step - blocks) * 4);
  if (order == Order::few) return;
  int8_t plain[2 * Bytes::W];
  for (int64_t k = 0; k < r.stride; k += sizeof plain) {
    std::memcpy(plain, q + k, sizeof plain);
    part(plain, q + k);
  }
}

// All rows of x, in the caller's scratch memory.
static Rounded round_rows(const QuantizedMatmul& p, Order order) {
  constexpr int64_t unit = 2 * Bytes::W;
  Rounded r;
  r.block = p.w.group == 32 ? 32 : 64;
  r.stride = (p.k + unit - 1) / unit * unit;
  if (r.stride % 1024 == 0) r.stride += unit;  // rows a power of two apart would share sets of the cache
  const int64_t blocks = (r.stride / r.block + V::W) / V::W * V::W;
  r.row_step = order == Order::many ? 1 : blocks;
  r.block_step = order == Order::many ? p.m : 1;
  r.q = static_cast<int8_t*>(scratch(0, p.m * r.stride));
  r.scales = static_cast<float*>(scratch(1, p.m * blocks * 8));
  r.sums = r.scales + p.m * blocks;
  int64_t each = 16384 / p.k + 1;
  parallel((p.m + each - 1) / each, 0.3 * p.m * p.k, [&](int64_t task) {
    for (int64_t m = task * each; m < p.m && m < (task + 1) * each; m++) round_row(p, r, m, order);
  });
  return r;
}

// `of_groups` (scales, or biases) of rows n to n + count as floats, one a block: a group has one or two.
static void widen_groups(const Packed& w, const void* of_groups, int64_t n, int64_t count, float* to,
                         int64_t blocks) {
  const int64_t groups = w.groups() * count;
  widen(w.scales_type, at(of_groups, w.scales_type, n * w.groups()), to, groups);
  if (blocks == w.groups()) return;
  for (int64_t i = groups - 1; i >= 0; i--) to[2 * i] = to[2 * i + 1] = to[i];
}

}  // namespace qgraph::QGRAPH_ISA::int8

#include "int8_few.h"
#include "int8_many.h"

namespace qgraph::QGRAPH_ISA {

// False where there is no such kernel: the exact one then runs.
static bool quantized_matmul_int8(const QuantizedMatmul& p) {
  const int group = p.w.group, bits = p.w.bits;
  if (!p.transpose || p.w.mode != Mode::affine || p.k % group) return false;
  if (group != 32 && group != 64 && group != 128) return false;
  if (bits < 2 || bits > 8 || bits == 7) return false;
  if (p.m <= int8::FEW && bits != 4 && bits != 8) return false;  // unpacking would take longer than is saved
  p.m <= int8::FEW ? int8::few_rows(p) : int8::many_rows(p);
  return true;
}

}  // namespace qgraph::QGRAPH_ISA
