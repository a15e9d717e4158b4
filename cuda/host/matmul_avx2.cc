#define QG_ISA avx2
#define QG_KERNELS kAVX2Kernels
#include "host/matmul_kernels.h"
