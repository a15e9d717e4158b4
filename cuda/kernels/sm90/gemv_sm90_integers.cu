// Instantiations of gemv_sm90: integers of 4 and 8 bits.

#include "formats/formats.cuh"
#include "kernels/gemv_sm90_launch.cuh"

namespace jax_qgemm {

template const char* launch_gemv_sm90<Int4>(const Product&, cudaStream_t, const char**);
template const char* launch_gemv_sm90<Int8>(const Product&, cudaStream_t, const char**);

}  // namespace jax_qgemm
