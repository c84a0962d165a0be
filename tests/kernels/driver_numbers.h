// Random numbers of the three types, and the comparison of results: for driver.cpp.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"

namespace driver {

using namespace qgraph;

inline int passed = 0, failed = 0;
inline std::string about;

inline uint64_t state = 88172645463325252ull;
inline uint64_t next() {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}
inline int between(int low, int high) { return low + static_cast<int>(next() % uint64_t(high - low + 1)); }
inline double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53 * 4 - 2; }  // of order 1
inline bool chance() { return next() >> 63; }
inline Type any_type() { return static_cast<Type>(between(0, 2)); }

inline double unit(Type type) { return type == Type::f32 ? 0x1p-24 : type == Type::bf16 ? 0x1p-8 : 0x1p-11; }
inline double least(Type type) { return type == Type::f16 ? 0x1p-24 : 0x1p-130; }

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
inline void expect(const Numbers& y, int64_t i, double exact, double magnitude, int64_t k) {
  double sums = (16 + std::sqrt(static_cast<double>(k))) * 0x1p-24 * magnitude;
  bool right = std::fabs(y[i] - exact) <= sums + unit(y.type()) * std::fabs(exact) + least(y.type());
  right ? passed++ : failed++;
  if (right || failed > 20) return;
  std::printf("%s [%lld]: found %.9g, expected %.9g\n", about.c_str(), (long long)i, y[i], exact);
}

inline std::string text(const char* name, std::initializer_list<int64_t> sizes) {
  std::string all = std::string(kernels().name) + " " + name;
  for (int64_t size : sizes) all += " " + std::to_string(size);
  return all;
}

}  // namespace driver
