// Attention, one pass over the keys.
#pragma once
#include <cstdlib>

#include "math.h"

namespace qgraph::QGRAPH_ISA {

static void attention(const Attention&) { std::abort(); }

}  // namespace qgraph::QGRAPH_ISA
