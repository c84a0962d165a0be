#include "../module.h"

namespace qgraph {

void bind_rope(nb::module_&) {}

}  // namespace qgraph
