// A matrix product in blocks, for many rows.
#pragma once
#include "pool.h"

namespace qgraph::QGRAPH_ISA {



}  // namespace qgraph::QGRAPH_ISA
