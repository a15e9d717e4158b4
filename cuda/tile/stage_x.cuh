// Activations from device memory to shared memory, as 16-bit mma operands.
#pragma once

#include "tile/mma.cuh"
#include "tile/scalar.cuh"

namespace jax_qgemm {

template <class T>
__device__ __forceinline__ float operand_to_float(uint16_t bits) {
  if constexpr (T::kIsBF16) return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  return __half2float(__ushort_as_half(bits));
}

// Writes `value` as an f16 operand, or as one, two or three bf16 terms `plane` elements apart.
template <class T>
__device__ __forceinline__ void stage_scalar(uint16_t* out, int plane, float value, int terms) {
  if constexpr (!T::kIsBF16) {
    *out = __half_as_ushort(__float2half_rn(value));
  } else {
    for (int term = 0; term < terms; ++term) {
      // Toward zero, so that no finite value becomes infinite; an infinite or NaN value has no remainder.
      const __nv_bfloat16 part = __float2bfloat16_rz(value);
      out[term * plane] = __bfloat16_as_ushort(part);
      value = isfinite(value) ? value - __bfloat162float(part) : 0.0f;
    }
  }
}

// Rows [0, rows) of x (k elements each, from element `base`) into planes of rows of `stride` elements, zero from k to
// `padded_k`. 16 bytes at a time where x is of the operand's own type and its rows are aligned.
template <class T>
__device__ __forceinline__ void stage_rows(uint16_t* out, int stride, int rows, int padded_k, const void* x,
                                           int64_t base, int64_t k, Scalar type, int terms, int threads) {
  const bool same_type = type == (T::kIsBF16 ? Scalar::kBF16 : Scalar::kF16);
  const auto* x16 = static_cast<const uint16_t*>(x) + base;
  if (same_type && k % 8 == 0 && reinterpret_cast<uintptr_t>(x16) % 16 == 0) {
    const int vectors = padded_k / 8;
    for (int i = threadIdx.x; i < rows * vectors; i += threads) {
      const int row = i / vectors, column = i % vectors * 8;
      uint4 v = {0, 0, 0, 0};
      if (column < k) v = __ldg(reinterpret_cast<const uint4*>(x16 + row * k + column));
      *reinterpret_cast<uint4*>(out + row * stride + column) = v;
    }
    return;
  }
  for (int i = threadIdx.x; i < rows * padded_k; i += threads) {
    const int row = i / padded_k, column = i % padded_k;
    const float value = column < k ? load_scalar(x, base + row * k + column, type) : 0.0f;
    stage_scalar<T>(out + row * stride + column, rows * stride, value, terms);
  }
}

}  // namespace jax_qgemm
