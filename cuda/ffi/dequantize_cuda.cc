#include "ffi/weight_check.h"
#include "kernels/matmul.h"

namespace jax_qgemm {
namespace ffi = xla::ffi;
namespace {

// out (*batch, rows, k): rows [first, first + rows) of n. The operands are those of check_stack().
ffi::Error dequantize_cuda(cudaStream_t stream, ffi::RemainingArgs operands, ffi::Result<ffi::AnyBuffer> out,
                           std::string_view format, int64_t group_size, int64_t scale_type, int64_t batch_ndim,
                           int64_t n, int64_t first) {
  const auto dims = out->dimensions();
  DenseRows rows = {};
  if (!scalar_of(out->element_type(), &rows.out_type)) return invalid("out must be f16, bf16 or f32");
  if (batch_ndim < 0 || dims.size() != static_cast<size_t>(batch_ndim) + 2) {
    return invalid("out must have batch_ndim + 2 axes");
  }
  rows.format = format;
  rows.out = out->untyped_data();
  rows.batch = 1;
  for (int64_t i = 0; i < batch_ndim; ++i) rows.batch *= dims[static_cast<size_t>(i)];
  rows.rows = dims[dims.size() - 2];
  rows.k = dims[dims.size() - 1];
  if (first < 0 || first % kTileN != 0 || rows.rows > n - first) return invalid("first and rows must lie within n");
  rows.first_tile_row = first / kTileN;
  rows.tile_rows = (n + kTileN - 1) / kTileN;
  const ffi::Error error = check_stack(operands, static_cast<int>(operands.size()), {format, group_size, scale_type},
                                       rows.batch, rows.tile_rows, rows.k, &rows.w, &rows.stack);
  if (error.failure() || out->element_count() == 0) return error;
  if (const char* problem = launch_dequantize(rows, stream)) {
    return ffi::Error::Internal(std::string("jax_qgemm.dequantize: ") + problem);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jax_qgemm

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_qgemm_dequantize_cuda, jax_qgemm::dequantize_cuda,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<std::string_view>("format")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("scale_type")
                                  .Attr<int64_t>("batch_ndim")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("first"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
