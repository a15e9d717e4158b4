// From XLA's buffers to a Product: everything that a kernel relies on is checked here.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "kernels/product.h"
#include "xla/ffi/api/ffi.h"

namespace jax_qgemm {

struct MatmulAttributes {
  std::string_view format;
  std::string_view kernel;
  int64_t group_size;  // integer formats: elements of k per scale, 0 is per channel
  int64_t scale_type;  // integer formats: a ScaleType
  int64_t batch_ndim;
  bool transpose;
  bool highest;
};

// Fills `product`. An empty output is no error: the caller returns early on it.
xla::ffi::Error make_product(xla::ffi::AnyBuffer x, xla::ffi::RemainingArgs planes,
                             xla::ffi::Result<xla::ffi::AnyBuffer> out, const MatmulAttributes& attributes,
                             Product* product);

// The part of the binding that both platforms share.
#define JAX_QGEMM_MATMUL_OPERANDS()     \
  Arg<xla::ffi::AnyBuffer>()            \
      .RemainingArgs()                  \
      .Ret<xla::ffi::AnyBuffer>()       \
      .Attr<std::string_view>("format") \
      .Attr<std::string_view>("kernel") \
      .Attr<int64_t>("group_size")      \
      .Attr<int64_t>("scale_type")      \
      .Attr<int64_t>("batch_ndim")      \
      .Attr<bool>("transpose")          \
      .Attr<bool>("highest")

}  // namespace jax_qgemm
