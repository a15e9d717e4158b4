#include <exception>

#include "ffi/matmul_check.h"
#include "ffi/thread_pool.h"
#include "host/matmul.h"

namespace jax_qgemm {
namespace ffi = xla::ffi;
namespace {

ffi::Error matmul_cpu(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs planes,
                      ffi::Result<ffi::AnyBuffer> out, std::string_view format, std::string_view kernel,
                      int64_t group_size, int64_t scale_type, int64_t batch_ndim, bool transpose, bool highest) {
  Product product;
  const MatmulAttributes attributes{format, kernel, group_size, scale_type, batch_ndim, transpose, highest};
  if (ffi::Error error = make_product(x, planes, out, attributes, &product); error.failure()) return error;
  if (out->element_count() == 0) return ffi::Error::Success();
  try {
    host::matmul(product, parallel_for(pool), pool.num_threads());
  } catch (const std::exception& e) {
    return ffi::Error::Internal(std::string("jax_qgemm.matmul: ") + e.what());
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_qgemm

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_qgemm_matmul_cpu, jax_qgemm::matmul_cpu,
                              xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().JAX_QGEMM_MATMUL_OPERANDS());
