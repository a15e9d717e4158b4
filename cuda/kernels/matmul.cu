#include <cuda_runtime.h>

#include "formats/formats.cuh"
#include "kernels/matmul.h"

namespace jax_qgemm {

template <class F>
const char* launch_format(const Product& p, cudaStream_t stream);

#define X(F) extern template const char* launch_format<F>(const Product&, cudaStream_t);
#include "formats/formats.def"
#undef X

const char* launch_matmul(const Product& p, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (major < 8) return "the GPU is older than compute capability 8.0";
  const char* problem = "unknown format";
  with_format(p.format, [&](auto format) { problem = launch_format<decltype(format)>(p, stream); });
  return problem;
}

}  // namespace jax_qgemm
