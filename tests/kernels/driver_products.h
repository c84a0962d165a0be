// Products, packed rows as numbers, and attention against loops in double precision: for driver.cpp.
#pragma once
#include "driver_numbers.h"

namespace driver {

// A random packed matrix in every format, and what its numbers are.
struct RandomPacked {
  Packed w{};
  std::vector<double> value, size;  // size: what the error of a number is relative to

  RandomPacked(int rows, int at_least) : scales_(Type::f32, 0), biases_(Type::f32, 0) {
    static const int BITS[] = {2, 3, 4, 5, 6, 8};
    w.mode = static_cast<Mode>(chance() ? 0 : between(1, 3));
    bool affine = w.mode == Mode::affine;
    w.bits = affine ? BITS[between(0, 5)] : w.mode == Mode::mxfp8 ? 8 : 4;
    w.group = affine ? 32 << between(0, 2) : w.mode == Mode::nvfp4 ? 16 : 32;
    int step = w.group < 32 ? 32 : w.group;
    w.rows = rows, w.columns = (at_least + step - 1) / step * step;
    w.global = w.mode == Mode::nvfp4 ? 0.75f : 1.0f;
    w.scales_type = any_type();
    scales_ = Numbers::random(w.scales_type, w.rows * w.groups());
    biases_ = Numbers::random(w.scales_type, w.rows * w.groups());
    for (int64_t i = 0; i < w.rows * w.groups(); i++)
      bytes_.push_back(uint8_t(w.mode == Mode::nvfp4 ? between(0x20, 0x48) : between(120, 130)));
    for (int64_t i = 0; i < w.rows * w.row_bytes() / 4; i++) words_.push_back(uint32_t(next() >> 32));
    if (w.mode == Mode::mxfp8)  // no NaN
      for (auto& word : words_) word &= 0xbfbfbfbf;
    w.words = words_.data();
    w.scales = affine ? scales_.data() : bytes_.data();
    w.biases = affine ? biases_.data() : nullptr;
    for (int64_t i = 0; i < w.rows * w.columns; i++) decode(i / w.columns, i % w.columns);
  }

 private:
  Numbers scales_, biases_;
  std::vector<uint8_t> bytes_;
  std::vector<uint32_t> words_;

  static double e4m3(int code) {
    int exponent = code >> 3 & 15, mantissa = code & 7;
    double f = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    return code & 128 ? -f : f;
  }
  static double e2m1(int code) {
    static const double NUMBERS[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    return code & 8 ? -NUMBERS[code & 7] : NUMBERS[code & 7];
  }
  void decode(int64_t row, int64_t column) {
    auto* bytes = reinterpret_cast<const uint8_t*>(words_.data()) + row * w.row_bytes();
    int code = 0;
    for (int b = 0; b < w.bits; b++) {
      int64_t bit = column * w.bits + b;
      code |= (bytes[bit / 8] >> bit % 8 & 1) << b;
    }
    int64_t group = row * w.groups() + column / w.group;
    double number = w.mode == Mode::affine ? code : w.mode == Mode::mxfp8 ? e4m3(code) : e2m1(code);
    double scale = w.mode == Mode::affine  ? scales_[group]
                   : w.mode == Mode::nvfp4 ? e4m3(bytes_[group]) * w.global
                                           : std::ldexp(1, bytes_[group] - 127);
    double bias = w.mode == Mode::affine ? biases_[group] : 0;
    value.push_back(scale * number + bias);
    size.push_back(std::fabs(scale * number) + std::fabs(bias));
  }
};

inline std::string format(const Packed& w) {
  static const char* const MODES[] = {" affine ", " mxfp4 ", " mxfp8 ", " nvfp4 "};
  return MODES[int(w.mode)] + std::to_string(w.bits) + "/" + std::to_string(w.group);
}

inline void dequantize() {
  RandomPacked p(between(1, 20), between(1, 300));
  int count = chance() ? static_cast<int>(p.w.rows) : between(1, 30);
  std::vector<int64_t> indices;
  for (int i = 0; i < count; i++) indices.push_back(between(0, static_cast<int>(p.w.rows) - 1));
  bool chosen = count != p.w.rows || chance();
  Numbers y(any_type(), count * p.w.columns);
  kernels().dequantize(Dequantize{p.w, chosen ? indices.data() : nullptr, count, y.data(), y.type()});
  about = text("dequantize", {p.w.rows, p.w.columns, chosen, int(y.type())}) + format(p.w);
  for (int64_t i = 0; i < y.size(); i++) {
    int64_t row = i / p.w.columns, from = (chosen ? indices[row] : row) * p.w.columns + i % p.w.columns;
    expect(y, i, p.value[from], p.size[from], 1);
  }
}

inline void quantized_matmul() {
  bool transpose = chance();
  int m = chance() ? between(1, 8) : between(1, 60);
  RandomPacked p(between(1, 150), between(1, 500));
  QuantizedMatmul c{};
  c.w = p.w, c.transpose = transpose, c.m = m;
  c.n = transpose ? p.w.rows : p.w.columns, c.k = transpose ? p.w.columns : p.w.rows;
  c.x_stride = c.k + between(0, 9), c.y_stride = c.n + between(0, 9);
  Numbers x = Numbers::random(any_type(), (m - 1) * c.x_stride + c.k);
  Numbers y(x.type(), (m - 1) * c.y_stride + c.n);
  std::vector<int64_t> x_rows, y_rows;
  for (int i = 0; i < m; i++) x_rows.push_back(between(0, m - 1)), y_rows.push_back(m - 1 - i);
  bool chosen = chance();
  if (chosen) c.x_rows = x_rows.data(), c.y_rows = y_rows.data();
  c.x = x.data(), c.x_type = x.type(), c.y = y.data(), c.y_type = y.type();
  kernels().quantized_matmul(c);
  about = text("quantized_matmul", {m, c.n, c.k, transpose, chosen, int(x.type())}) + format(p.w);
  for (int64_t i = 0; i < m * c.n; i++) {
    int64_t row = i / c.n, n = i % c.n, from = (chosen ? x_rows[row] : row) * c.x_stride;
    double sum = 0, size = 0;
    for (int64_t k = 0; k < c.k; k++) {
      int64_t at = transpose ? n * c.k + k : k * c.n + n;
      sum += x[from + k] * p.value[at], size += std::fabs(x[from + k]) * p.size[at];
    }
    expect(y, (chosen ? y_rows[row] : row) * c.y_stride + n, sum, size, c.k);
  }
}

inline void matmul() {
  int m = chance() ? between(1, 8) : between(1, 60), n = between(1, 100), k = between(1, 200);
  if (between(0, 4) == 0) n = 1;
  Type type = any_type();
  int batch = between(1, 3), wide = (m > n ? (m > k ? m : k) : (n > k ? n : k)) + between(0, 5);
  Numbers a = Numbers::random(type, 2 * wide * wide), b = Numbers::random(type, 2 * wide * wide);
  Numbers y(type, int64_t(batch) * m * n);
  int64_t a_offsets[3], b_offsets[3];  // stacks of matrices, or one of them for all
  for (int i = 0; i < 3; i++) {
    a_offsets[i] = between(0, 1) * wide * wide;
    b_offsets[i] = between(0, 1) * wide * wide;
  }
  bool a_turned = chance(), b_turned = chance();
  Matmul c{};
  c.a = a.data(), c.a_row = a_turned ? 1 : wide, c.a_column = a_turned ? wide : 1;
  c.b = b.data(), c.b_row = b_turned ? 1 : wide, c.b_column = b_turned ? wide : 1;
  c.type = type, c.y = y.data(), c.y_stride = n, c.m = m, c.n = n, c.k = k;
  c.batch = batch, c.a_offsets = a_offsets, c.b_offsets = b_offsets;
  kernels().matmul(c);
  about = text("matmul", {batch, m, n, k, a_turned, b_turned, int(type)});
  for (int64_t i = 0; i < y.size(); i++) {
    int64_t which = i / (m * n), row = i / n % m, column = i % n;
    double sum = 0, size = 0;
    for (int64_t j = 0; j < k; j++) {
      double x = a[a_offsets[which] + row * c.a_row + j * c.a_column];
      double product = x * b[b_offsets[which] + j * c.b_row + column * c.b_column];
      sum += product, size += std::fabs(product);
    }
    expect(y, i, sum, size, k);
  }
}

inline void attention() {
  Attention c{};
  c.batch = between(1, 2), c.kv_heads = between(1, 3), c.heads = c.kv_heads * between(1, 3);
  c.queries = chance() ? between(1, 3) : between(1, 40), c.keys = c.queries + between(0, 60);
  c.dims = between(1, 70), c.v_dims = chance() ? c.dims : between(1, 70);
  c.type = any_type(), c.scale = 0.3f, c.causal = chance();
  // (batch, length, heads, dims) in memory.
  auto strides = [](int64_t* s, int64_t heads, int64_t length, int64_t dims) {
    s[0] = length * heads * dims, s[1] = dims, s[2] = heads * dims;
  };
  strides(c.q_strides, c.heads, c.queries, c.dims), strides(c.k_strides, c.kv_heads, c.keys, c.dims);
  strides(c.v_strides, c.kv_heads, c.keys, c.v_dims), strides(c.y_strides, c.heads, c.queries, c.v_dims);
  Numbers q = Numbers::random(c.type, c.batch * c.q_strides[0]);
  Numbers k = Numbers::random(c.type, c.batch * c.k_strides[0]);
  Numbers v = Numbers::random(c.type, c.batch * c.v_strides[0]), y(c.type, c.batch * c.y_strides[0]);
  Numbers sinks = Numbers::random(Type::f32, c.heads), mask = Numbers::random(c.type, c.queries * c.keys);
  std::unique_ptr<char[]> seen(new char[c.queries * c.keys]);
  for (int64_t i = 0; i < c.queries * c.keys; i++) seen[i] = i % c.keys == 0 || chance();
  c.q = q.data(), c.k = k.data(), c.v = v.data(), c.y = y.data(), c.mask_type = c.type;
  int masked = between(0, 2);  // not, by bools, by numbers
  c.mask_is_bool = masked == 1;
  if (masked) c.mask = masked == 1 ? static_cast<const void*>(seen.get()) : mask.data();
  c.mask_strides[2] = c.keys, c.mask_strides[3] = 1;
  bool sunk = chance();
  if (sunk) c.sinks = static_cast<const float*>(sinks.data());
  kernels().attention(c);
  about = text("attention", {c.batch, c.heads, c.kv_heads, c.queries, c.keys, c.dims, c.v_dims});
  about += text(" causal, mask, sinks", {c.causal, masked, sunk, int(c.type)});
  std::vector<double> weight(static_cast<size_t>(c.keys));
  for (int64_t i = 0; i < c.batch * c.heads * c.queries; i++) {
    int64_t b = i / (c.heads * c.queries), h = i / c.queries % c.heads, l = i % c.queries;
    int64_t kv = h / (c.heads / c.kv_heads);
    int64_t row = b * c.q_strides[0] + h * c.q_strides[1] + l * c.q_strides[2];
    double total = sunk ? std::exp(sinks[h]) : 0, largest = 0;
    for (int64_t j = 0; j < c.keys; j++) {
      double score = 0, size = 0;
      int64_t key = b * c.k_strides[0] + kv * c.k_strides[1] + j * c.k_strides[2];
      for (int64_t d = 0; d < c.dims; d++) {
        double product = q[row + d] * k[key + d];
        score += product, size += std::fabs(product);
      }
      score = score * c.scale + (masked == 2 ? mask[l * c.keys + j] : 0);
      bool hidden = (c.causal && j > l + c.keys - c.queries) || (masked == 1 && !seen[l * c.keys + j]);
      largest = std::fmax(largest, size * c.scale + std::fabs(score));
      total += weight[j] = hidden ? 0 : std::exp(score);
    }
    for (int64_t d = 0; d < c.v_dims; d++) {
      double sum = 0, size = 0;
      for (int64_t j = 0; j < c.keys; j++) {
        double x = weight[j] / total * v[b * c.v_strides[0] + kv * c.v_strides[1] + j * c.v_strides[2] + d];
        sum += x, size += std::fabs(x);
      }
      int64_t at = b * c.y_strides[0] + h * c.y_strides[1] + l * c.y_strides[2] + d;
      expect(y, at, sum, size * (4 + 2 * largest), c.keys + c.dims);
    }
  }
}

}  // namespace driver
