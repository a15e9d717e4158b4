// An element of x as 16-bit mma operands.
#pragma once

#include "tile/mma.cuh"
#include "tile/scalar.cuh"

namespace jax_qgemm {

// Writes `value` as an f16 operand, or as one, two or three bf16 terms `plane` elements apart.
template <class T>
__device__ __forceinline__ void stage_scalar(uint16_t* out, int plane, float value, int terms) {
  if constexpr (!T::kIsBF16) {
    *out = __half_as_ushort(__float2half_rn(value));
  } else {
#pragma unroll 1
    for (int term = 0; term < terms; ++term) {
      // Toward zero, so that no finite value becomes infinite; an infinite or NaN value has no remainder.
      const __nv_bfloat16 part = __float2bfloat16_rz(value);
      out[term * plane] = __bfloat16_as_ushort(part);
      value = isfinite(value) ? value - __bfloat162float(part) : 0.0f;
    }
  }
}

}  // namespace jax_qgemm
