// gemv_sm90 as the dispatcher sees it. Its sources are compiled for sm_90a alone, and only where that was asked for.
#pragma once

#include "kernels/product.h"

typedef struct CUstream_st* cudaStream_t;

namespace jax_qgemm {

// What went wrong, or nullptr. Where the kernel does not serve the product, *refusal says why, and nothing is launched.
template <class F>
const char* launch_gemv_sm90(const Product& p, cudaStream_t stream, const char** refusal);

}  // namespace jax_qgemm
