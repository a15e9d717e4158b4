#include "ffi/launch_cuda.h"

namespace jax_qgemm {
namespace ffi = xla::ffi;
namespace {

ffi::Error integer_matmul_cuda(cudaStream_t stream, ffi::AnyBuffer codes, ffi::AnyBuffer scales,
                               ffi::RemainingArgs operands, ffi::Result<ffi::AnyBuffer> out, std::string_view format,
                               std::string_view kernel, int64_t group_size, int64_t scale_type, int64_t batch_ndim,
                               std::string_view activation, bool gated, bool has_scale, bool has_bias,
                               bool has_residual) {
  Product product;
  const MatmulAttributes attributes{format, kernel, group_size, scale_type, batch_ndim, false};
  const EpilogueAttributes epilogue{activation, gated, has_scale, has_bias, has_residual};
  const ffi::Error error = make_integer_product(codes, scales, operands, out, attributes, epilogue, &product);
  return error.failure() ? error : launch_checked(product, stream, out);
}

}  // namespace
}  // namespace jax_qgemm

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jax_qgemm_integer_matmul_cuda, jax_qgemm::integer_matmul_cuda,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>().JAX_QGEMM_INTEGER_OPERANDS(),
    {xla::ffi::Traits::kCmdBufferCompatible});
