// Norms, softmax and rope against loops in double precision: for driver.cpp.
#pragma once
#include "driver_numbers.h"

namespace driver {

// Rows with gaps, counted through two axes.
struct Strided {
  Numbers x;
  Rows rows{};
  explicit Strided(Type type, int a, int b, int n)
      : x(Numbers::random(type, int64_t(a) * (b * (n + 3) + 5))) {
    rows.x = x.data(), rows.type = type, rows.columns = n;
    int64_t sizes[] = {a, b, 1, 1}, strides[] = {b * (n + 3) + 5, n + 3, 0, 0};
    for (int i = 0; i < 4; i++) rows.sizes[i] = sizes[i], rows.strides[i] = strides[i];
  }
  int64_t begin(int64_t row) const {
    return row / rows.sizes[1] * rows.strides[0] + row % rows.sizes[1] * rows.strides[1];
  }
};

inline int columns() { return chance() ? between(1, 70) : between(1, 1100); }

inline void norm() {
  int a = between(1, 4), b = between(1, 5), n = columns();
  Strided s(any_type(), a, b, n);
  bool centred = chance(), weighted = chance(), biased = centred && chance();
  Type parameter = chance() ? s.rows.type : Type::f32;
  Numbers w = Numbers::random(parameter, n), bias = Numbers::random(parameter, n);
  Numbers y(weighted || biased ? parameter : s.rows.type, int64_t(a) * b * n);
  s.rows.y = y.data();
  const void *weight = weighted ? w.data() : nullptr, *plus = biased ? bias.data() : nullptr;
  Norm c{s.rows, weight, plus, parameter, y.type(), 1e-5f, centred};
  kernels().norm(c);
  about = text("norm", {a, b, n, centred, weighted, biased, int(s.rows.type), int(parameter)});
  for (int64_t r = 0; r < a * b; r++) {
    double mean = 0, size = 0, squares = 0;
    for (int j = 0; j < n; j++) mean += s.x[s.begin(r) + j] / n, size += std::fabs(s.x[s.begin(r) + j]) / n;
    if (!centred) mean = size = 0;
    for (int j = 0; j < n; j++) squares += std::pow(s.x[s.begin(r) + j] - mean, 2) / n;
    double scale = 1 / std::sqrt(squares + 1e-5f);
    for (int j = 0; j < n; j++) {
      double x = s.x[s.begin(r) + j], factor = scale * (weighted ? w[j] : 1), shift = biased ? bias[j] : 0;
      double magnitude = (std::fabs(x) + size) * std::fabs(factor) * (1 + size * scale) + std::fabs(shift);
      expect(y, r * n + j, (x - mean) * factor + shift, magnitude, n);
    }
  }
}

inline void softmax() {
  int a = between(1, 4), b = between(1, 5), n = columns();
  Strided s(any_type(), a, b, n);
  Numbers y(s.rows.type, int64_t(a) * b * n);
  s.rows.y = y.data();
  kernels().softmax(Softmax{s.rows});
  about = text("softmax", {a, b, n, int(s.rows.type)});
  for (int64_t r = 0; r < a * b; r++) {
    double top = -1e30, total = 0;
    for (int j = 0; j < n; j++) top = std::fmax(top, s.x[s.begin(r) + j]);
    for (int j = 0; j < n; j++) total += std::exp(s.x[s.begin(r) + j] - top);
    for (int j = 0; j < n; j++) {
      double exact = std::exp(s.x[s.begin(r) + j] - top) / total;
      expect(y, r * n + j, exact, exact * 5, n);
    }
  }
}

inline void reduce() {
  int a = between(1, 4), b = between(1, 5), n = columns();
  Strided s(any_type(), a, b, n);
  Numbers tops(s.rows.type, int64_t(a) * b), sums(s.rows.type, int64_t(a) * b);
  std::vector<uint32_t> places(a * b);
  auto call = [&](void* y, Reduction kind) {
    s.rows.y = y;
    kernels().reduce(Reduce{s.rows, kind});
  };
  call(tops.data(), Reduction::max), call(sums.data(), Reduction::logsumexp);
  call(places.data(), Reduction::argmax);
  about = text("reduce", {a, b, n, int(s.rows.type)});
  for (int64_t r = 0; r < a * b; r++) {
    int place = 0;
    double total = 0;
    for (int j = 0; j < n; j++)
      if (s.x[s.begin(r) + j] > s.x[s.begin(r) + place]) place = j;
    double top = s.x[s.begin(r) + place];
    for (int j = 0; j < n; j++) total += std::exp(s.x[s.begin(r) + j] - top);
    expect(tops, r, top, 0, 1);
    expect(sums, r, top + std::log(total), std::fabs(top) + std::log(total) + 1, n);
    places[r] == uint32_t(place) ? passed++ : (failed++, std::printf("%s: argmax\n", about.c_str()));
  }
}

inline void rope() {
  int batch = between(1, 3), heads = between(1, 4), length = between(1, 20), half = between(1, 40);
  int dims = 2 * half, n = dims + (chance() ? 0 : between(1, 20));
  bool traditional = chance(), each = chance(), transposed = chance();
  Type type = any_type();
  int64_t count = int64_t(batch) * heads * length * n;
  Numbers x = Numbers::random(type, count), y(type, count), speeds = Numbers::random(Type::f32, half);
  Numbers offsets(Type::f32, batch);
  for (int b = 0; b < batch; b++) offsets.set(b, static_cast<float>(between(0, 5000)));
  int64_t strides[] = {int64_t(heads) * length * n, n, n, 0};
  strides[transposed ? 2 : 1] *= transposed ? heads : length;
  Rope c{};
  c.rows = {x.data(), type, {batch, heads, length, 1}, {}, n, y.data()};
  for (int i = 0; i < 4; i++) c.rows.strides[i] = strides[i];
  for (int i = 0; i < 3; i++) c.y_strides[i] = strides[i];
  c.dims = dims, c.traditional = traditional, c.scale = 0.5f, c.offset_step = each;
  c.speeds = static_cast<const float*>(speeds.data()), c.offsets = static_cast<const float*>(offsets.data());
  kernels().rope(c);
  about = text("rope", {batch, heads, length, dims, n, traditional, each, transposed, int(type)});
  for (int b = 0; b < batch; b++)
    for (int h = 0; h < heads; h++)
      for (int l = 0; l < length; l++) {
        int64_t row = b * strides[0] + h * strides[1] + l * strides[2];
        float position = (static_cast<float>(l) + static_cast<float>(offsets[each ? b : 0])) * 0.5f;
        for (int i = 0; i < half; i++) {
          double angle = position * static_cast<float>(speeds[i]);
          int64_t one = row + (traditional ? 2 * i : i), two = row + (traditional ? 2 * i + 1 : half + i);
          double size = std::fabs(x[one]) + std::fabs(x[two]);
          expect(y, one, x[one] * std::cos(angle) - x[two] * std::sin(angle), size, 1);
          expect(y, two, x[one] * std::sin(angle) + x[two] * std::cos(angle), size, 1);
        }
        for (int i = dims; i < n; i++) expect(y, row + i, x[row + i], 0, 1);
      }
}

}  // namespace driver
