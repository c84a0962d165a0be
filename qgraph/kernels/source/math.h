// exp, tanh and the like on vectors.
#pragma once

namespace qgraph::QGRAPH_ISA {



}  // namespace qgraph::QGRAPH_ISA
