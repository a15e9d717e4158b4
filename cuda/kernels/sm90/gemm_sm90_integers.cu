// Instantiations of gemm_sm90: integers.

#include "formats/formats.cuh"
#include "kernels/gemm_sm90_launch.cuh"

namespace jax_qgemm {

template const char* launch_gemm_sm90<Int2>(const Product&, cudaStream_t, const char**);
template const char* launch_gemm_sm90<Int3>(const Product&, cudaStream_t, const char**);
template const char* launch_gemm_sm90<Int4>(const Product&, cudaStream_t, const char**);
template const char* launch_gemm_sm90<Int8>(const Product&, cudaStream_t, const char**);

}  // namespace jax_qgemm
