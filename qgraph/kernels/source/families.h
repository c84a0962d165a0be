// All families of kernels, compiled for one instruction set, and its table.
#pragma once
#include "types.h"
//
#include "functions.h"
//
#include "attention.h"
#include "dense.h"
#include "elementwise.h"
#include "int8.h"
#include "norms.h"
#include "quantized.h"
#include "reductions.h"
#include "rope.h"

namespace qgraph::QGRAPH_ISA {

extern const Kernels table;
const Kernels table = {
    .name = QGRAPH_NAME,
    .quantized_matmul = quantized_matmul,
    .dequantize = dequantize,
    .matmul = matmul,
    .attention = attention,
    .norm = norm,
    .softmax = softmax,
    .reduce = reduce,
    .rope = rope,
    .elementwise = elementwise,
};

}  // namespace qgraph::QGRAPH_ISA
