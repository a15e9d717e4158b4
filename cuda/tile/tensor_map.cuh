// The description of a matrix that Hopper's copy engine reads.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/product.h"

namespace jax_qgemm {

// From the driver that runs, so that nothing links against it; nullptr where it is too old.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return usable ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
  }();
  return encoder;
}

// x as rows of k elements of 16 or 8 bits, in boxes of box_rows by 128 bytes with the 128-byte swizzle. Returns what
// went wrong, or nullptr. `x` and its rows have to be aligned to 16 bytes.
inline const char* encode_rows(CUtensorMap* map, const void* x, Scalar type, int64_t rows, int64_t k, int box_rows) {
  const auto encode = tensor_map_encoder();
  if (!encode) return "the driver is too old for tensor maps";
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const CUtensorMapDataType map_type = type == Scalar::kF16    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                       : type == Scalar::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                               : CU_TENSOR_MAP_DATA_TYPE_UINT8;
  const cuuint32_t bytes = map_type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  const cuuint64_t stride = static_cast<cuuint64_t>(k) * bytes;
  const cuuint32_t box[2] = {128 / bytes, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult result =
      encode(map, map_type, 2, const_cast<void*>(x), sizes, &stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refuses a tensor map of x";
}

// Rows of row_bytes in boxes of box_rows by box_bytes, all of them multiples of 16, as they are; columns are counted in
// 8 bytes. Zeros outside.
inline const char* encode_bytes(CUtensorMap* map, const void* base, int64_t rows, int64_t row_bytes, int box_rows,
                                int box_bytes) {
  const auto encode = tensor_map_encoder();
  if (!encode) return "the driver is too old for tensor maps";
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_bytes) / 8, static_cast<cuuint64_t>(rows)};
  const auto stride = static_cast<cuuint64_t>(row_bytes);
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_bytes) / 8, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_INT64, 2, const_cast<void*>(base), sizes, &stride, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "the driver refuses a tensor map of w";
}

}  // namespace jax_qgemm
