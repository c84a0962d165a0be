// 64-bit Arm.
#define QGRAPH_ISA neon
#define QGRAPH_NAME "neon"
#include "../simd/neon.h"
#include "../families.h"
