// Every entry of the kernel tables against plain loops in double precision, without MLX or Python: for
// sanitizers, and for other CPUs under an emulator. `driver` runs all of it, `driver norm rope` these two.
// Compiled with the kernels' cpu.cpp, pool.cpp, isa/*.cpp, lanes.cpp once a set, and -DQGRAPH_SETS.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cpu.h"
#include "kernels.h"
#include "pool.h"

namespace qgraph {
#define X(set) namespace set { void check_lanes(int& passed, int& failed); }
QGRAPH_SETS
#undef X
}  // namespace qgraph

using namespace qgraph;

namespace {

int passed = 0, failed = 0;
std::string about;

uint64_t state = 88172645463325252ull;
uint64_t next() {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}
int between(int low, int high) { return low + static_cast<int>(next() % uint64_t(high - low + 1)); }
double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53 * 4 - 2; }  // of order 1
bool chance() { return next() >> 63; }
Type any_type() { return static_cast<Type>(between(0, 2)); }

double unit(Type type) { return type == Type::f32 ? 0x1p-24 : type == Type::bf16 ? 0x1p-8 : 0x1p-11; }
double least(Type type) { return type == Type::f16 ? 0x1p-24 : 0x1p-130; }

// Numbers of one type in memory of just their size, so that a sanitizer sees what is read beyond.
class Numbers {
 public:
  Numbers(Type type, int64_t n) : type_(type), bytes_(new char[n * size_of(type)]()), n_(n) {}
  static Numbers random(Type type, int64_t n) {
    Numbers a(type, n);
    for (int64_t i = 0; i < n; i++) a.set(i, static_cast<float>(uniform()));
    return a;
  }
  void* data() const { return bytes_.get(); }
  int64_t size() const { return n_; }
  Type type() const { return type_; }
  double operator[](int64_t i) const {
    if (type_ == Type::f32) {
      float f;
      std::memcpy(&f, bytes_.get() + i * 4, 4);
      return f;
    }
    uint16_t h;
    std::memcpy(&h, bytes_.get() + i * 2, 2);
    if (type_ == Type::bf16) {
      uint32_t u = static_cast<uint32_t>(h) << 16;
      float f;
      std::memcpy(&f, &u, 4);
      return f;
    }
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    double size = exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return h & 0x8000 ? -size : size;
  }
  // Cut, not rounded: these are inputs.
  void set(int64_t i, float f) {
    uint32_t u;
    std::memcpy(&u, &f, 4);
    if (type_ == Type::f32) {
      std::memcpy(bytes_.get() + i * 4, &f, 4);
      return;
    }
    int exponent = static_cast<int>(u >> 23 & 255) - 112;
    uint16_t f16 = exponent > 0 ? static_cast<uint16_t>(exponent << 10 | (u >> 13 & 1023)) : 0;
    uint16_t h = type_ == Type::bf16 ? u >> 16 : static_cast<uint16_t>((u >> 16 & 0x8000) | f16);
    std::memcpy(bytes_.get() + i * 2, &h, 2);
  }

 private:
  Type type_;
  std::unique_ptr<char[]> bytes_;
  int64_t n_;
};

// `magnitude` is what the error of the sums, of `k` terms, is relative to.
void expect(const Numbers& y, int64_t i, double exact, double magnitude, int64_t k) {
  double sums = (16 + std::sqrt(static_cast<double>(k))) * 0x1p-24 * magnitude;
  bool right = std::fabs(y[i] - exact) <= sums + unit(y.type()) * std::fabs(exact) + least(y.type());
  right ? passed++ : failed++;
  if (right || failed > 20) return;
  std::printf("%s [%lld]: found %.9g, expected %.9g\n", about.c_str(), (long long)i, y[i], exact);
}

std::string text(const char* name, std::initializer_list<int64_t> sizes) {
  std::string all = std::string(kernels().name) + " " + name;
  for (int64_t size : sizes) all += " " + std::to_string(size);
  return all;
}

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

int columns() { return chance() ? between(1, 70) : between(1, 1100); }

void norm() {
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

void softmax() {
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

void rope() {
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

struct Family {
  const char* name;
  void (*check)();
  int rounds;
};
const Family FAMILIES[] = {{"norm", norm, 60}, {"softmax", softmax, 60}, {"rope", rope, 60}};

bool wanted(int count, char** names, const char* name) {
  for (int i = 1; i < count; i++)
    if (!std::strcmp(names[i], name)) return true;
  return count < 2;
}

}  // namespace

int main(int count, char** names) {
  auto sets = instruction_sets();
  for (auto& set : sets) {
    use(set);
#define X(name) if (set == #name && wanted(count, names, "lanes")) qgraph::name::check_lanes(passed, failed);
    QGRAPH_SETS
#undef X
    for (int threads : {1, 2}) {
      set_threads(threads);
      for (auto& family : FAMILIES)
        for (int i = 0; wanted(count, names, family.name) && i < family.rounds; i++) family.check();
    }
    std::printf("%s: %d passed, %d failed\n", set.c_str(), passed, failed);
  }
  return failed ? 1 : 0;
}
