#include "ffi/matmul_check.h"
#include "kernels/matmul.h"

namespace jax_qgemm {
namespace ffi = xla::ffi;
namespace {

ffi::Error matmul_cuda(cudaStream_t stream, ffi::AnyBuffer x, ffi::RemainingArgs planes,
                       ffi::Result<ffi::AnyBuffer> out, std::string_view format, std::string_view kernel,
                       int64_t group_size, int64_t scale_type, int64_t batch_ndim, bool transpose, bool highest) {
  Product product;
  const MatmulAttributes attributes{format, kernel, group_size, scale_type, batch_ndim, transpose, highest};
  if (ffi::Error error = make_product(x, planes, out, attributes, &product); error.failure()) return error;
  if (out->element_count() == 0) return ffi::Error::Success();
  if (const char* problem = launch_matmul(product, stream)) {
    return ffi::Error::Internal(std::string("jax_qgemm.matmul: ") + problem);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_qgemm

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_qgemm_matmul_cuda, jax_qgemm::matmul_cuda,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>().JAX_QGEMM_MATMUL_OPERANDS(),
    {xla::ffi::Traits::kCmdBufferCompatible});
