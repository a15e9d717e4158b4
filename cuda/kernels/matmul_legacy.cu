// Instantiations of the kernels: legacy.

#include "formats/formats.cuh"
#include "kernels/launch.cuh"

namespace jax_qgemm {

template const char* launch_format<Q4_0>(const Product&, cudaStream_t);
template const char* launch_format<Q4_0>(const DenseRows&, cudaStream_t);
template const char* launch_format<Q4_1>(const Product&, cudaStream_t);
template const char* launch_format<Q4_1>(const DenseRows&, cudaStream_t);
template const char* launch_format<Q5_0>(const Product&, cudaStream_t);
template const char* launch_format<Q5_0>(const DenseRows&, cudaStream_t);
template const char* launch_format<Q5_1>(const Product&, cudaStream_t);
template const char* launch_format<Q5_1>(const DenseRows&, cudaStream_t);
template const char* launch_format<Q8_0>(const Product&, cudaStream_t);
template const char* launch_format<Q8_0>(const DenseRows&, cudaStream_t);

}  // namespace jax_qgemm
