// Instantiations of gemm_sm90: legacy.

#include "formats/formats.cuh"
#include "kernels/gemm_sm90_launch.cuh"

namespace jax_qgemm {

template const char* launch_gemm_sm90<Q4_0>(const Product&, cudaStream_t, const char**);
template const char* launch_gemm_sm90<Q4_1>(const Product&, cudaStream_t, const char**);
template const char* launch_gemm_sm90<Q5_0>(const Product&, cudaStream_t, const char**);
template const char* launch_gemm_sm90<Q5_1>(const Product&, cudaStream_t, const char**);
template const char* launch_gemm_sm90<Q8_0>(const Product&, cudaStream_t, const char**);

}  // namespace jax_qgemm
