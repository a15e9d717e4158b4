// gemm_sm90_a8 as the dispatcher sees it. Its sources are compiled for sm_90a alone, and only where that was asked for.
#pragma once

#include "kernels/product.h"

typedef struct CUstream_st* cudaStream_t;

namespace jax_qgemm {

// The weights that codes of x can be multiplied with.
template <class F>
constexpr bool kServesCodes = F::kGroup == 0 && (F::kLowBits == 4 || F::kLowBits == 8);

// What went wrong, or nullptr.
template <class F>
const char* launch_gemm_sm90_a8(const Product& p, cudaStream_t stream);

}  // namespace jax_qgemm
