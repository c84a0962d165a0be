// Rotary positions.
#pragma once
#include <cstdlib>

#include "math.h"

namespace qgraph::QGRAPH_ISA {

static void rope(const Rope&) { std::abort(); }

}  // namespace qgraph::QGRAPH_ISA
