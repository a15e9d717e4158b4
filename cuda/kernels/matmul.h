// The CUDA launchers of the product.
#pragma once

#include "kernels/product.h"

typedef struct CUstream_st* cudaStream_t;

namespace jax_qgemm {

// Enqueues the product on `stream`; returns what went wrong, or nullptr. Allocates nothing and never synchronizes.
const char* launch_matmul(const Product& product, cudaStream_t stream);

// The same for the decoding of rows.
const char* launch_dequantize(const DenseRows& rows, cudaStream_t stream);

}  // namespace jax_qgemm
