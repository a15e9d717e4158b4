// Loads and stores of f16, bf16 or f32 elements whose type is known at run time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/product.h"

namespace jax_qgemm {

__device__ __forceinline__ float load_scalar(const void* p, int64_t i, Scalar type) {
  switch (type) {
    case Scalar::kF16:
      return __half2float(static_cast<const __half*>(p)[i]);
    case Scalar::kBF16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

__device__ __forceinline__ void store_scalar(void* p, int64_t i, Scalar type, float value) {
  switch (type) {
    case Scalar::kF16:
      static_cast<__half*>(p)[i] = __float2half_rn(value);
      break;
    case Scalar::kBF16:
      static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(value);
      break;
    default:
      static_cast<float*>(p)[i] = value;
  }
}

}  // namespace jax_qgemm
