#include "../module.h"

namespace qgraph {

void bind_matmul(nb::module_&) {}

}  // namespace qgraph
