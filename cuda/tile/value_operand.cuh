// Weights themselves as the A operand of an mma: of 16-bit values, not of integers.
#pragma once

#include "tile/lane_codes.cuh"
#include "tile/mma.cuh"

namespace jax_qgemm {

// scale * (level - zero) + minimum, in float32 and to the bit as value_of() gives it, then rounded once to x's type. So
// one sum runs over all of k, whatever the groups. In f16 a weight below 2^-25 becomes zero and one above 65504
// infinite; bf16 has float32's range.
template <class F, class T>
struct ValueOperand {
  __device__ __forceinline__ static void decode(uint32_t (&a)[4], const LaneCodes<F>& codes, int step,
                                                const AffinePair& affine) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t levels = codes.levels(2 * step + h);  // of elements k, k+8, k+1, k+9
      const Affine& row = affine.row[h];
      a[h] = pack(value<0>(levels, row), value<2>(levels, row));
      a[h + 2] = pack(value<1>(levels, row), value<3>(levels, row));
    }
  }

 private:
  // A level in the right bits of a float is a sum with a power of two. Where the products with the power and with the
  // zero are exact in float32, which scales of few bits make them, one fma is all it takes; scales that are powers of
  // two, as some tables of floats have, could overflow.
  static constexpr bool kNarrow = !F::kHasMinimum && !F::kHasTable && !wide_levels<F>();

  // e: 0x00 to 0x03, the byte of `levels`.
  template <uint32_t e>
  __device__ __forceinline__ static float value(uint32_t levels, const Affine& row) {
    if constexpr (kNarrow) {
      const float level = __uint_as_float(__byte_perm(levels, 0x43000000u, 0x7044u | e << 8));  // 128 more
      return fmaf(level, row.scale, -(128.0f + static_cast<float>(row.zero)) * row.scale);
    }
    const float level = __uint_as_float(__byte_perm(levels, 0x4b000000u, 0x7650u | e));  // 2^23 more
    if constexpr (F::kHasMinimum) {
      // Such formats have no zero point.
      return add_rn(fmaf(level, row.scale, -0x1p23f * row.scale), row.minimum);
    } else {
      return mul_rn(level - (0x1p23f + static_cast<float>(row.zero)), row.scale);
    }
  }
  __device__ __forceinline__ static uint32_t pack(float first, float second) {
    if constexpr (T::kIsBF16) {
      const __nv_bfloat162 v = __floats2bfloat162_rn(first, second);
      return reinterpret_cast<const uint32_t&>(v);
    } else {
      const __half2 v = __floats2half2_rn(first, second);
      return reinterpret_cast<const uint32_t&>(v);
    }
  }
};

}  // namespace jax_qgemm
