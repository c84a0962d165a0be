#include "../module.h"

namespace qgraph {

void bind_attention(nb::module_&) {}

}  // namespace qgraph
