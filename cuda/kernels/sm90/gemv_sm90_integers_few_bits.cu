// Instantiations of gemv_sm90: integers of 2 and 3 bits.

#include "formats/formats.cuh"
#include "kernels/gemv_sm90_launch.cuh"

namespace jax_qgemm {

template const char* launch_gemv_sm90<Int2>(const Product&, cudaStream_t, const char**);
template const char* launch_gemv_sm90<Int3>(const Product&, cudaStream_t, const char**);

}  // namespace jax_qgemm
