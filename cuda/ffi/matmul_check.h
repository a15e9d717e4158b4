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
  bool highest;
};

struct EpilogueAttributes {
  std::string_view activation;  // "none", or the name of one
  bool gated, has_scale, has_bias, has_residual;
};

// Fills `product`, without an epilogue; `operands` are those of check_stack(). An empty output is no error: the caller
// returns early on it.
xla::ffi::Error make_product(xla::ffi::AnyBuffer x, xla::ffi::RemainingArgs operands,
                             xla::ffi::Result<xla::ffi::AnyBuffer> out, const MatmulAttributes& attributes,
                             bool transpose, Product* product);

// The same with an epilogue. Behind those `operands` come those of scale, bias and residual that there are.
xla::ffi::Error make_fused_product(xla::ffi::AnyBuffer x, xla::ffi::RemainingArgs operands,
                                   xla::ffi::Result<xla::ffi::AnyBuffer> out, const MatmulAttributes& attributes,
                                   const EpilogueAttributes& epilogue, Product* product);

// The same of quantized x: `codes` int8 or float8_e4m3fn (*batch, ..., k), and their `scales`, float32
// (*batch, ..., 1). There are no experts.
xla::ffi::Error make_integer_product(xla::ffi::AnyBuffer codes, xla::ffi::AnyBuffer scales,
                                     xla::ffi::RemainingArgs operands, xla::ffi::Result<xla::ffi::AnyBuffer> out,
                                     const MatmulAttributes& attributes, const EpilogueAttributes& epilogue,
                                     Product* product);

// The parts of the bindings that handlers share.
#define JAX_QGEMM_PRODUCT()             \
  RemainingArgs()                       \
      .Ret<xla::ffi::AnyBuffer>()       \
      .Attr<std::string_view>("format") \
      .Attr<std::string_view>("kernel") \
      .Attr<int64_t>("group_size")      \
      .Attr<int64_t>("scale_type")      \
      .Attr<int64_t>("batch_ndim")
#define JAX_QGEMM_EPILOGUE()           \
  Attr<std::string_view>("activation") \
      .Attr<bool>("gated")             \
      .Attr<bool>("has_scale")         \
      .Attr<bool>("has_bias")          \
      .Attr<bool>("has_residual")
#define JAX_QGEMM_OPERANDS() Arg<xla::ffi::AnyBuffer>().JAX_QGEMM_PRODUCT().Attr<bool>("highest")
#define JAX_QGEMM_MATMUL_OPERANDS() JAX_QGEMM_OPERANDS().Attr<bool>("transpose")
#define JAX_QGEMM_FUSED_OPERANDS() JAX_QGEMM_OPERANDS().JAX_QGEMM_EPILOGUE()
#define JAX_QGEMM_INTEGER_OPERANDS() \
  Arg<xla::ffi::AnyBuffer>().Arg<xla::ffi::AnyBuffer>().JAX_QGEMM_PRODUCT().JAX_QGEMM_EPILOGUE()

}  // namespace jax_qgemm
