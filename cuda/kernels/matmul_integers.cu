// Instantiations of the kernels: integers.

#include "formats/formats.cuh"
#include "kernels/launch.cuh"

namespace jax_qgemm {

template const char* launch_format<Int2>(const Product&, cudaStream_t);
template const char* launch_format<Int2>(const DenseRows&, cudaStream_t);
template const char* launch_format<Int3>(const Product&, cudaStream_t);
template const char* launch_format<Int3>(const DenseRows&, cudaStream_t);
template const char* launch_format<Int4>(const Product&, cudaStream_t);
template const char* launch_format<Int4>(const DenseRows&, cudaStream_t);
template const char* launch_format<Int8>(const Product&, cudaStream_t);
template const char* launch_format<Int8>(const DenseRows&, cudaStream_t);

}  // namespace jax_qgemm
