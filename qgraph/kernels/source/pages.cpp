#include "pages.h"

#include <cstdint>
#include <mutex>
#include <unordered_map>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qgraph {

void in_large_pages(const void* memory, size_t bytes) {
#if defined(__linux__)
  constexpr size_t SMALL = 1 << 18, PAGE = 1 << 21;
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, of Linux 6.1; older kernels refuse it
  if (bytes < SMALL) return;
  static std::mutex mutex;
  static std::unordered_map<const void*, size_t> asked;
  std::lock_guard<std::mutex> lock(mutex);
  if (!asked.emplace(memory, bytes).second) return;
  // Whole pages, those at the ends too: what else lies in them belongs to this process as well.
  uintptr_t from = reinterpret_cast<uintptr_t>(memory) / PAGE * PAGE;
  uintptr_t to = (reinterpret_cast<uintptr_t>(memory) + bytes + PAGE - 1) / PAGE * PAGE;
  for (; from < to; from += PAGE) madvise(reinterpret_cast<void*>(from), PAGE, COLLAPSE);
#endif
}

}  // namespace qgraph
