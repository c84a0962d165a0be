#include "../module.h"

namespace qgraph {

void bind_quantized(nb::module_&) {}

}  // namespace qgraph
