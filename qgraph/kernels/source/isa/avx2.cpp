// AVX2, FMA and F16C.
#define QGRAPH_ISA avx2
#define QGRAPH_NAME "avx2"
#include "../simd/avx2.h"
#include "../families.h"
