// Instantiations of gemm_sm90_a8: int8 codes with int8.

#include "formats/formats.cuh"
#include "kernels/gemm_sm90_a8_launch.cuh"

namespace jax_qgemm {

template const char* launch_int8_codes<Int8>(const Product&, const DeviceLimits&, cudaStream_t);
template const char* launch_gemm_sm90_a8<Int8>(const Product&, cudaStream_t);

}  // namespace jax_qgemm
