// Products with packed weights and activations rounded to 8 bits.
#pragma once
#include "formats.h"

namespace qgraph::QGRAPH_ISA {



}  // namespace qgraph::QGRAPH_ISA
