// Instantiations of gemm_sm90_a8: int8 codes with int4.

#include "formats/formats.cuh"
#include "kernels/gemm_sm90_a8_launch.cuh"

namespace jax_qgemm {

extern template const char* launch_fp8_codes<Int4>(const Product&, const DeviceLimits&, cudaStream_t);
template const char* launch_int8_codes<Int4>(const Product&, const DeviceLimits&, cudaStream_t);
template const char* launch_gemm_sm90_a8<Int4>(const Product&, cudaStream_t);

}  // namespace jax_qgemm
