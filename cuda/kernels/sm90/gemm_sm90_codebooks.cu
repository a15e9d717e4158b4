// Instantiations of gemm_sm90: codebooks.

#include "formats/formats.cuh"
#include "kernels/gemm_sm90_launch.cuh"

namespace jax_qgemm {

template const char* launch_gemm_sm90<IQ4_NL>(const Product&, cudaStream_t, const char**);
template const char* launch_gemm_sm90<IQ4_XS>(const Product&, cudaStream_t, const char**);
template const char* launch_gemm_sm90<MXFP4>(const Product&, cudaStream_t, const char**);
template const char* launch_gemm_sm90<NVFP4>(const Product&, cudaStream_t, const char**);

}  // namespace jax_qgemm
