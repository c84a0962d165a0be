#include "cpu.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace qgraph {

// QGRAPH_SETS is what the build compiled: one X(namespace) for each, the best first.
#define X(set) namespace set { extern const Kernels table; }
QGRAPH_SETS
#undef X

namespace {

bool supported(const std::string& set) {
#if defined(__x86_64__)
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (set == "avx512vnni") return avx512 && __builtin_cpu_supports("avx512vnni");
  if (set == "avx512") return avx512;
  if (set == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return set == "neon" || set == "portable";  // neon: part of every 64-bit Arm
}

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
#define X(set) if (supported(#set)) found.push_back(&set::table);
  QGRAPH_SETS
#undef X
  return found;
}

std::atomic<const Kernels*> g_kernels{nullptr};

}  // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (auto* k : available()) names.push_back(k->name);
  return names;
}

void use(const std::string& name) {
  for (auto* k : available())
    if (name == k->name) return g_kernels.store(k);
  throw std::invalid_argument("this CPU has no kernels for the instruction set '" + name + "'");
}

const Kernels& kernels() {
  const Kernels* k = g_kernels.load(std::memory_order_relaxed);
  if (!k) g_kernels.store(k = available().front());
  return *k;
}

}  // namespace qgraph
