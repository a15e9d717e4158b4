// Instantiations of the kernels: codebooks.

#include "formats/formats.cuh"
#include "kernels/launch.cuh"

namespace jax_qgemm {

template const char* launch_format<IQ4_NL>(const Product&, cudaStream_t);
template const char* launch_format<IQ4_NL>(const DenseRows&, cudaStream_t);
template const char* launch_format<IQ4_XS>(const Product&, cudaStream_t);
template const char* launch_format<IQ4_XS>(const DenseRows&, cudaStream_t);
template const char* launch_format<MXFP4>(const Product&, cudaStream_t);
template const char* launch_format<MXFP4>(const DenseRows&, cudaStream_t);
template const char* launch_format<NVFP4>(const Product&, cudaStream_t);
template const char* launch_format<NVFP4>(const DenseRows&, cudaStream_t);

}  // namespace jax_qgemm
