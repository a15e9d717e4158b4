#include <exception>

#include "ffi/matmul_check.h"
#include "ffi/thread_pool.h"
#include "host/matmul.h"

namespace jax_qgemm {
namespace ffi = xla::ffi;
namespace {

ffi::Error run(const Product& product, ffi::ThreadPool& pool, ffi::Result<ffi::AnyBuffer> out) {
  if (out->element_count() == 0) return ffi::Error::Success();
  try {
    host::matmul(product, parallel_for(pool), pool.num_threads());
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string("jax_qgemm.matmul: ") + e.what());
  }
  return ffi::Error::Success();
}

ffi::Error matmul_cpu(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                      ffi::Result<ffi::AnyBuffer> out, std::string_view format, std::string_view kernel,
                      int64_t group_size, int64_t scale_type, int64_t batch_ndim, bool highest, bool transpose) {
  Product product;
  const MatmulAttributes attributes{format, kernel, group_size, scale_type, batch_ndim, highest};
  const ffi::Error error = make_product(x, operands, out, attributes, transpose, &product);
  return error.failure() ? error : run(product, pool, out);
}

ffi::Error fused_matmul_cpu(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands,
                            ffi::Result<ffi::AnyBuffer> out, std::string_view format, std::string_view kernel,
                            int64_t group_size, int64_t scale_type, int64_t batch_ndim, bool highest,
                            std::string_view activation, bool gated, bool has_scale, bool has_bias, bool has_residual) {
  Product product;
  const MatmulAttributes attributes{format, kernel, group_size, scale_type, batch_ndim, highest};
  const EpilogueAttributes epilogue{activation, gated, has_scale, has_bias, has_residual};
  const ffi::Error error = make_fused_product(x, operands, out, attributes, epilogue, &product);
  return error.failure() ? error : run(product, pool, out);
}

}  // namespace
}  // namespace jax_qgemm

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_qgemm_matmul_cpu, jax_qgemm::matmul_cpu,
                              xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().JAX_QGEMM_MATMUL_OPERANDS());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_qgemm_fused_matmul_cpu, jax_qgemm::fused_matmul_cpu,
                              xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().JAX_QGEMM_FUSED_OPERANDS());
