// Packed weights as floats: one decoder a format.
#pragma once
#include "kernels.h"

namespace qgraph::QGRAPH_ISA {



}  // namespace qgraph::QGRAPH_ISA
