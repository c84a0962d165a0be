#include "../module.h"

namespace qgraph {

void bind_norms(nb::module_&) {}

}  // namespace qgraph
