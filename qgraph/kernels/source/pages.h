// Large pages under weights.
#pragma once
#include <cstddef>

namespace qgraph {

// Ask once that the memory of a weight lie in large pages, where the system has them: a weight is read from end
// to end at every step, and with pages of 4 KiB the look-ups of addresses take up to half of the time of a read.
// Changes no number; where it cannot be done, nothing happens.
void in_large_pages(const void* memory, size_t bytes);

}  // namespace qgraph
