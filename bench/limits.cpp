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
  Floats sums[12], x = Floats{} + 0.999f, y = Floats{} + 0.001f;
  for (int i = 0; i < 12; i++) sums[i] = Floats{} + float(i);
  double begun = now();
  for (long n = 0; n < rounds; n++)
    for (int i = 0; i < 12; i++) {
      sums[i] = sums[i] * x + y;
      asm volatile("" : "+v"(sums[i]));
    }
  return 12.0 * rounds * 2 * 16 / (now() - begun) / 1e9;
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
