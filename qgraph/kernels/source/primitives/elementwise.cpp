#include "../module.h"

namespace qgraph {

void bind_elementwise(nb::module_&) {}

}  // namespace qgraph
