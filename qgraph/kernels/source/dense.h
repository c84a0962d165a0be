// Dense products.
#pragma once
#include <cstdlib>

#include "gemm.h"

namespace qgraph::QGRAPH_ISA {

static void matmul(const Matmul&) { std::abort(); }

}  // namespace qgraph::QGRAPH_ISA
