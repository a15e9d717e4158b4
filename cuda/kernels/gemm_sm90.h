// gemm_sm90 as the dispatcher sees it. Its sources are compiled for sm_90a alone, and only where that was asked for.
#pragma once

#include "kernels/product.h"

typedef struct CUstream_st* cudaStream_t;

namespace jax_qgemm {

// What keeps gemm_sm90 from the product, what went wrong, or nullptr.
template <class F>
const char* launch_gemm_sm90(const Product& p, cudaStream_t stream);

}  // namespace jax_qgemm
