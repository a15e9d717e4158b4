#define QG_ISA avx512
#define QG_KERNELS kAVX512Kernels
#include "host/matmul_kernels.h"
