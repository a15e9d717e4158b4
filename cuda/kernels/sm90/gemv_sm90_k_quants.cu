// Instantiations of gemv_sm90: k_quants.

#include "formats/formats.cuh"
#include "kernels/gemv_sm90_launch.cuh"

namespace jax_qgemm {

template const char* launch_gemv_sm90<Q2_K>(const Product&, cudaStream_t, const char**);
template const char* launch_gemv_sm90<Q3_K>(const Product&, cudaStream_t, const char**);
template const char* launch_gemv_sm90<Q4_K>(const Product&, cudaStream_t, const char**);
template const char* launch_gemv_sm90<Q5_K>(const Product&, cudaStream_t, const char**);
template const char* launch_gemv_sm90<Q6_K>(const Product&, cudaStream_t, const char**);

}  // namespace jax_qgemm
