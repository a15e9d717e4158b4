#include "ffi/launch_cuda.h"

namespace jax_qgemm {
namespace ffi = xla::ffi;
namespace {

ffi::Error matmul_cuda(cudaStream_t stream, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                       ffi::Result<ffi::AnyBuffer> out, std::string_view format, std::string_view kernel,
                       int64_t group_size, int64_t scale_type, int64_t batch_ndim, bool highest, bool transpose) {
  Product product;
  const MatmulAttributes attributes{format, kernel, group_size, scale_type, batch_ndim, highest};
  const ffi::Error error = make_product(x, operands, out, attributes, transpose, &product);
  return error.failure() ? error : launch_checked(product, stream, out);
}

ffi::Error fused_matmul_cuda(cudaStream_t stream, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                             ffi::Result<ffi::AnyBuffer> out, std::string_view format, std::string_view kernel,
                             int64_t group_size, int64_t scale_type, int64_t batch_ndim, bool highest,
                             std::string_view activation, bool gated, bool has_scale, bool has_bias,
                             bool has_residual) {
  Product product;
  const MatmulAttributes attributes{format, kernel, group_size, scale_type, batch_ndim, highest};
  const EpilogueAttributes epilogue{activation, gated, has_scale, has_bias, has_residual};
  const ffi::Error error = make_fused_product(x, operands, out, attributes, epilogue, &product);
  return error.failure() ? error : launch_checked(product, stream, out);
}

}  // namespace
}  // namespace jax_qgemm

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_qgemm_matmul_cuda, jax_qgemm::matmul_cuda,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>().JAX_QGEMM_MATMUL_OPERANDS(),
    {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_qgemm_fused_matmul_cuda, jax_qgemm::fused_matmul_cuda,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>().JAX_QGEMM_FUSED_OPERANDS(),
    {xla::ffi::Traits::kCmdBufferCompatible});
