// Chains of element-wise operations, computed a block at a time.
#pragma once
#include <cstdlib>

#include "functions.h"

namespace qgraph::QGRAPH_ISA {

static void elementwise(const Elementwise&) { std::abort(); }

}  // namespace qgraph::QGRAPH_ISA
