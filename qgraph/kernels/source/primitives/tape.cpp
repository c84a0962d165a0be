#include "../module.h"

namespace qgraph {

void bind_tape(nb::module_&) {}

}  // namespace qgraph
