// Plain C++.
#define QGRAPH_ISA portable
#define QGRAPH_NAME "portable"
#include "../simd/portable.h"
#include "../families.h"
