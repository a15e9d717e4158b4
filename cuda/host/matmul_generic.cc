#define QG_ISA generic
#define QG_KERNELS kGenericKernels
#include "host/matmul_kernels.h"
