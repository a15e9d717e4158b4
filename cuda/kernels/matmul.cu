#include <cuda_runtime.h>

#include "formats/formats.cuh"
#include "kernels/matmul.h"

namespace jax_qgemm {

template <class F>
const char* launch_format(const Product& p, cudaStream_t stream);
template <class F>
const char* launch_format(const DenseRows& rows, cudaStream_t stream);

#define X(F)                                                                  \
  extern template const char* launch_format<F>(const Product&, cudaStream_t); \
  extern template const char* launch_format<F>(const DenseRows&, cudaStream_t);
#include "formats/formats.def"
#undef X

namespace {

template <class Work>
const char* launch_by_format(const Work& work, cudaStream_t stream) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (major < 8) return "the GPU is older than compute capability 8.0";
  const char* problem = "unknown format";
  with_format(work.format, [&](auto format) { problem = launch_format<decltype(format)>(work, stream); });
  return problem;
}

}  // namespace

const char* launch_matmul(const Product& product, cudaStream_t stream) { return launch_by_format(product, stream); }
const char* launch_dequantize(const DenseRows& rows, cudaStream_t stream) { return launch_by_format(rows, stream); }

}  // namespace jax_qgemm
