// Products with packed weights, exact: sums in f32.
#pragma once
#include <cstdlib>

#include "formats.h"
#include "gemm.h"

namespace qgraph::QGRAPH_ISA {

static void quantized_matmul(const QuantizedMatmul&) { std::abort(); }
static void dequantize(const Dequantize&) { std::abort(); }

}  // namespace qgraph::QGRAPH_ISA
