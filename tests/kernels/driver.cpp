// Every entry of the kernel tables against plain loops in double precision, without MLX or Python: for
// sanitizers, and for other CPUs under an emulator. `driver` runs all of it, `driver norm rope` these two.
// Compiled with the kernels' cpu.cpp, pool.cpp, isa/*.cpp, lanes.cpp once a set, and -DQGRAPH_SETS.
#include "cpu.h"
#include "driver_products.h"
#include "driver_rows.h"
#include "pool.h"

namespace qgraph {
#define X(set) namespace set { void check_lanes(int& passed, int& failed); }
QGRAPH_SETS
#undef X
}  // namespace qgraph

namespace driver {

struct Family {
  const char* name;
  void (*check)();
  int rounds;
};
const Family FAMILIES[] = {
    {"norm", norm, 60},          {"softmax", softmax, 60},
    {"reduce", reduce, 60},
    {"rope", rope, 60},          {"dequantize", dequantize, 60},
    {"matmul", matmul, 60},      {"quantized_matmul", quantized_matmul, 120},
    {"attention", attention, 60}};

bool wanted(int count, char** names, const char* name) {
  for (int i = 1; i < count; i++)
    if (!std::strcmp(names[i], name)) return true;
  return count < 2;
}

}  // namespace driver

int main(int count, char** names) {
  using namespace driver;
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
