// What one thread of this CPU can do at most: `limits fma` prints GF/s, `limits read BYTES` prints GB/s.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

typedef float Floats __attribute__((vector_size(64)));
typedef unsigned long Words __attribute__((vector_size(64)));

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static double fma(long rounds) {
  Floats x = Floats{} + 0.999f, y = Floats{} + 0.001f;
  Floats a = x, b = 2 * x, c = 3 * x, d = 4 * x, e = 5 * x, f = 6 * x;
  Floats g = 7 * x, h = 8 * x, i = 9 * x, j = 10 * x, k = 11 * x, l = 12 * x;
  double begun = now();
  for (long n = 0; n < rounds; n++) {
    a = a * x + y, b = b * x + y, c = c * x + y, d = d * x + y, e = e * x + y, f = f * x + y;
    g = g * x + y, h = h * x + y, i = i * x + y, j = j * x + y, k = k * x + y, l = l * x + y;
    asm volatile("" : "+v"(x));  // twelve chains, which no compiler may shorten
  }
  double taken = now() - begun;
  asm volatile("" ::"v"(a + b + c + d + e + f + g + h + i + j + k + l));
  return 12.0 * rounds * 2 * 16 / taken / 1e9;
}

static double read(const Words* memory, size_t bytes) {
  Words sums[4] = {};
  double begun = now();
  for (size_t i = 0; i + 4 <= bytes / sizeof(Words); i += 4)
    for (int j = 0; j < 4; j++) sums[j] ^= memory[i + j];
  asm volatile("" ::"v"(sums[0] ^ sums[1] ^ sums[2] ^ sums[3]));
  return bytes / (now() - begun) / 1e9;
}

int main(int count, char** arguments) {
  double best = 0;
  if (count == 2 && std::string(arguments[1]) == "fma") {
    for (int i = 0; i < 5; i++) best = std::max(best, fma(3000000));
  } else if (count == 3) {
    size_t bytes = std::strtoul(arguments[2], nullptr, 10);
    auto* memory = static_cast<Words*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    std::memset(memory, 1, bytes);
    for (int i = 0; i < 40; i++) best = std::max(best, read(memory, bytes));
  } else {
    return 2;
  }
  std::printf("%.2f\n", best);
}
