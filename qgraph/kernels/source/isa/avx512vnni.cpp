// AVX-512 with the 8-bit dot products (VNNI).
#define QGRAPH_ISA avx512vnni
#define QGRAPH_NAME "avx512vnni"
#include "../simd/avx512.h"
#include "../families.h"
