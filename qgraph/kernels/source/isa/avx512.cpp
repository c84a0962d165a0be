// AVX-512 without VNNI.
#define QGRAPH_ISA avx512
#define QGRAPH_NAME "avx512"
#include "../simd/avx512.h"
#include "../families.h"
