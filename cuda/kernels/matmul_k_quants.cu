// Instantiations of the kernels: k_quants.

#include "formats/formats.cuh"
#include "kernels/launch.cuh"

namespace jax_qgemm {

template const char* launch_format<Q2_K>(const Product&, cudaStream_t);
template const char* launch_format<Q2_K>(const DenseRows&, cudaStream_t);
template const char* launch_format<Q3_K>(const Product&, cudaStream_t);
template const char* launch_format<Q3_K>(const DenseRows&, cudaStream_t);
template const char* launch_format<Q4_K>(const Product&, cudaStream_t);
template const char* launch_format<Q4_K>(const DenseRows&, cudaStream_t);
template const char* launch_format<Q5_K>(const Product&, cudaStream_t);
template const char* launch_format<Q5_K>(const DenseRows&, cudaStream_t);
template const char* launch_format<Q6_K>(const Product&, cudaStream_t);
template const char* launch_format<Q6_K>(const DenseRows&, cudaStream_t);

}  // namespace jax_qgemm
