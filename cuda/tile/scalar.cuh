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

// Elements i and i + 1, in one store where their address allows it.
__device__ __forceinline__ void store_pair(void* p, int64_t i, Scalar type, float2 values) {
  if (i % 2 != 0) {
    store_scalar(p, i, type, values.x);
    store_scalar(p, i + 1, type, values.y);
  } else if (type == Scalar::kF16) {
    reinterpret_cast<__half2*>(p)[i / 2] = __floats2half2_rn(values.x, values.y);
  } else if (type == Scalar::kBF16) {
    reinterpret_cast<__nv_bfloat162*>(p)[i / 2] = __floats2bfloat162_rn(values.x, values.y);
  } else {
    reinterpret_cast<float2*>(p)[i / 2] = values;
  }
}

// Elements i to i + 3 in one load, i being a multiple of 4.
__device__ __forceinline__ float4 load_quad(const void* p, int64_t i, Scalar type) {
  if (type == Scalar::kF32) return static_cast<const float4*>(p)[i / 4];
  const uint2 bits = static_cast<const uint2*>(p)[i / 4];
  const auto at = [&](uint32_t half) {
    const auto h = static_cast<uint16_t>(half);
    return type == Scalar::kF16 ? f16_to_f32(h) : bf16_to_f32(h);
  };
  return make_float4(at(bits.x), at(bits.x >> 16), at(bits.y), at(bits.y >> 16));
}

// The same, stored.
__device__ __forceinline__ void store_quad(void* p, int64_t i, Scalar type, float4 v) {
  const auto bits = [](const auto& pair) { return reinterpret_cast<const uint32_t&>(pair); };
  if (type == Scalar::kF16) {
    const __half2 low = __floats2half2_rn(v.x, v.y), high = __floats2half2_rn(v.z, v.w);
    reinterpret_cast<uint2*>(p)[i / 4] = {bits(low), bits(high)};
  } else if (type == Scalar::kBF16) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(v.x, v.y), high = __floats2bfloat162_rn(v.z, v.w);
    reinterpret_cast<uint2*>(p)[i / 4] = {bits(low), bits(high)};
  } else {
    reinterpret_cast<float4*>(p)[i / 4] = v;
  }
}

}  // namespace jax_qgemm
