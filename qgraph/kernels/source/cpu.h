// Which instruction set is used.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace qgraph {

// The instruction sets that are compiled in and that this CPU has, the best first.
std::vector<std::string> instruction_sets();

// Use the kernels of one of them; throws std::invalid_argument for another.
void use(const std::string& name);

}  // namespace qgraph
