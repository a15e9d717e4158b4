// What the CUDA handlers of products do with a checked one.
#pragma once

#include "ffi/matmul_check.h"
#include "kernels/matmul.h"

namespace jax_qgemm {

inline xla::ffi::Error launch_checked(const Product& product, cudaStream_t stream,
                                      xla::ffi::Result<xla::ffi::AnyBuffer> out) {
  if (out->element_count() == 0) return xla::ffi::Error::Success();
  if (const char* problem = launch_matmul(product, stream)) {
    return xla::ffi::Error::Internal(std::string("jax_qgemm.matmul: ") + problem);
  }
  return xla::ffi::Error::Success();
}

}  // namespace jax_qgemm
