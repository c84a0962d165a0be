// The table of kernels: what every instruction set provides. No MLX in here: pointers, sizes and strides.
//
// One set of source files (gemm.h, formats.h, …) is compiled once for every instruction set, inside the
// namespace that QGRAPH_ISA names; which table is used is decided at run time (cpu.cpp).
#pragma once
#include <cstddef>
#include <cstdint>

namespace qgraph {

enum class Type : int { f32, bf16, f16 };  // of activations, scales and results
enum class Mode : int { affine, mxfp4, mxfp8, nvfp4 };

inline int size_of(Type t) { return t == Type::f32 ? 4 : 2; }

// A packed matrix of `rows` rows of `columns` numbers, row-major, as mx.quantize lays it out: groups run
// along the columns; `words` of a row follow each other low bits first; 3, 5 and 6 bits straddle words.
// affine: number = scale * q + bias, both of type `scales_type`. The fp modes: one byte of scale a group
// (e8m0; e4m3 for nvfp4), no biases; `global` is nvfp4's factor for the whole matrix, else 1.
struct Packed {
  const uint32_t* words;
  const void* scales;
  const void* biases;
  Type scales_type;
  Mode mode;
  int bits, group;
  float global;
  int64_t rows, columns;

  int64_t row_bytes() const { return columns * bits / 8; }
  int64_t groups() const { return columns / group; }
};

// y[m, n] = sum over k of x[m, k] w[n, k] (transpose), or of x[m, k] w[k, n]; sums in f32, one rounding.
// Rows of x and y may lie apart (strides in elements), their columns follow each other. Where `x_rows` is
// given, row m of the product reads row x_rows[m] of x, and where `y_rows` is, writes row y_rows[m] of y.
struct QuantizedMatmul {
  const void* x;
  Type x_type;
  int64_t x_stride;
  const int64_t* x_rows;
  Packed w;
  bool transpose;
  void* y;
  Type y_type;
  int64_t y_stride;
  const int64_t* y_rows;
  int64_t m, n, k;
  bool int8;  // activations rounded to 8 bits a group (a faster, less exact product) where there is a kernel
};

// Rows of a packed matrix as numbers: row i of y is row indices[i] of w (or i where indices is null).
struct Dequantize {
  Packed w;
  const int64_t* indices;
  int64_t count;
  void* y;  // contiguous
  Type y_type;
};

// y[m, n] = sum over k of a[m, k] b[k, n]; sums in f32. Any strides of a and b (elements); rows of y contiguous.
// A batch of problems starts at the given offsets (elements; null where `batch` is 1) of a and b; in y they
// follow each other.
struct Matmul {
  const void* a;
  int64_t a_row, a_column;
  const void* b;
  int64_t b_row, b_column;
  Type type;  // of a, b and y
  void* y;
  int64_t y_stride;
  int64_t m, n, k;
  int64_t batch;
  const int64_t *a_offsets, *b_offsets;
};

// softmax(scale q k^T + mask) v for every (batch, head); query head h reads head h / (heads / kv_heads).
// The last axis of q, k, v and y is contiguous; strides in elements over batch, head and position.
// mask: a bool (one byte) or a float of mask_type, by strides over batch, head, query, key (0 broadcasts);
// causal: query i sees keys up to i + keys - queries. sinks: one f32 score a head that has no value.
struct Attention {
  const void *q, *k, *v;
  Type type;
  int64_t q_strides[3], k_strides[3], v_strides[3];
  void* y;
  int64_t y_strides[3];
  int64_t batch, heads, kv_heads, queries, keys, dims, v_dims;
  float scale;
  bool causal;
  const void* mask;
  bool mask_is_bool;
  Type mask_type;
  int64_t mask_strides[4];
  const float* sinks;
};

// Rows whose last axis (`columns`) is contiguous. The rows of x are counted through up to four axes with
// their strides; the rows of y are contiguous in the same order.
struct Rows {
  const void* x;
  Type type;
  int64_t sizes[4], strides[4];
  int64_t columns;
  void* y;
};

// x / sqrt(mean(x²) + eps) * weight, or with `centred` (x - mean) / sqrt(var + eps) * weight + bias.
struct Norm {
  Rows rows;
  const void *weight, *bias;  // of type parameter_type, or null
  Type parameter_type, y_type;
  float eps;
  bool centred;
};

struct Softmax {
  Rows rows;
};

// One number a row, at y[row]; argmax gives a uint32_t, and like max takes a NaN, the first, for the largest.
enum class Reduction { max, argmax, logsumexp };
struct Reduce {
  Rows rows;
  Reduction kind;
};

// Pairs of the first `dims` features turned by (position * scale) * speeds[i]; sizes are (batch, heads,
// length, 1) and the columns are the features. Position of row l of batch b: offsets[b * offset_step] + l.
// The rows of y lie as y_strides say (over batch, head and position); y may be x, with x's strides.
struct Rope {
  Rows rows;
  int64_t y_strides[3];
  int dims;
  bool traditional;
  float scale;
  const float* speeds;  // dims / 2
  const float* offsets;
  int offset_step;  // 0: one offset for all batches
};

// A chain of element-wise operations over `count` elements; see elementwise.h for the instructions.
struct Elementwise;

// The kernels of one instruction set. Each call divides its work over the threads of the pool itself.
struct Kernels {
  const char* name;
  void (*quantized_matmul)(const QuantizedMatmul&);
  void (*dequantize)(const Dequantize&);
  void (*matmul)(const Matmul&);
  void (*attention)(const Attention&);
  void (*norm)(const Norm&);
  void (*softmax)(const Softmax&);
  void (*reduce)(const Reduce&);
  void (*rope)(const Rope&);
  void (*elementwise)(const Elementwise&);
};

// The table in use: the best of this CPU, or the one that QGRAPH_ISA names.
const Kernels& kernels();

}  // namespace qgraph
