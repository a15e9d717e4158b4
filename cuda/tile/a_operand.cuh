// Codes of a weight as the A operand of an mma.
#pragma once

#include "tile/lane_codes.cuh"
#include "tile/mma.cuh"
#include "tile/table_operand.cuh"

namespace jax_qgemm {

// Exact: the operand is level - zero, at 12 or more instructions a k-step.
//
// Not exact: it is the level alone, at 5 to 8, and the sums begin at -zero times the sum of x. In f16 the bits of an
// integer below 2048 are the f16 number integer * 2^-24 (the exponent fields 0 and 1 are one linear range), and shifted
// by 4 that times 2^-20; tensor cores take subnormals as they are. Such powers of two belong to rows, so they leave the
// sums at the very end. In bf16, 0x4300 | u is 128 + u. Sums of levels are larger than those of differences, so this
// costs float32 some bits: it is for 16-bit x.
//
// A 4-bit float is a 16-bit one whose other bits are zero: three bits fewer of exponent and one bit of mantissa, put
// where they belong, are its value times 2^-14 (f16) or 2^-126 (bf16, which one multiplication brings back).
template <class F, class T, bool Exact>
struct AOperand {
  // The integers of bf16's 8 significant bits do not hold 128 + a level of 8 bits.
  static constexpr bool kFloat4 = requires { F::kIsE2M1; } && !T::kSplit;
  static constexpr bool kExact = Exact || kFloat4 || T::kSplit || (T::kIsBF16 && wide_levels<F>());
  static constexpr bool kNibbles = F::kLowBits == 4 && F::kHighBits == 0 && !F::kHasTable;
  static constexpr bool kShifted = !kExact && !T::kIsBF16 && kNibbles;  // rows g+8 are 16 times as large
  static constexpr uint32_t kMagic = T::kIsBF16 ? 0x43004300u : 0;
  static constexpr int kBias = !kExact && T::kIsBF16 ? 128 : 0;  // level + kBias is the operand
  // Of rows g and g+8: true sum / sum.
  static constexpr float kUnit = T::kIsBF16 ? 1.0f : kFloat4 ? 0x1p15f : kExact ? 1.0f : 0x1p24f;
  static constexpr float kHighUnit = kShifted ? 0x1p20f : kUnit;

  __device__ __forceinline__ static void decode(uint32_t (&a)[4], const LaneCodes<F>& codes, int step,
                                                const AffinePair& affine) {
    if constexpr (kFloat4) {
      decode_float4(a, codes.low.words[step]);
    } else if constexpr (F::kHasTable) {
      TableOperand<F, T, !kExact>::decode(a, codes.low.words[step]);
    } else if constexpr (kExact) {
      Converter<T::kIsBF16, wide_levels<F>()>(affine.row[0].zero)(codes.levels(2 * step), a[0], a[2]);
      Converter<T::kIsBF16, wide_levels<F>()>(affine.row[1].zero)(codes.levels(2 * step + 1), a[1], a[3]);
    } else if constexpr (kNibbles) {
      const uint32_t word = codes.low.words[step];
      a[0] = place<0x000f000fu>(word);
      a[1] = kShifted ? word & 0x00f000f0u : place<0x000f000fu>(word >> 4);
      a[2] = place<0x000f000fu>(word >> 8);
      a[3] = kShifted ? word >> 8 & 0x00f000f0u : place<0x000f000fu>(word >> 12);
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t levels = codes.levels(2 * step + h);
        a[h] = place<0x00ff00ffu>(levels);
        a[h + 2] = place<0x00ff00ffu>(levels >> 8);
      }
    }
  }

  // What multiplies a sum of x.
  __device__ __forceinline__ static float minimum(const Affine& row) {
    return kBias ? fmaf(-static_cast<float>(kBias), row.scale, row.minimum) : row.minimum;
  }

  // Of the exact operand: what gives sums of x.
  __device__ __forceinline__ static void ones(uint32_t (&a)[4]) { a[0] = a[1] = a[2] = a[3] = T::kOne; }

 private:
  // Nibble i of each half of the word is the 4-bit float of register i: sign, two bits of exponent, one of mantissa.
  __device__ __forceinline__ static void decode_float4(uint32_t (&a)[4], uint32_t word) {
    constexpr int kMagnitude = T::kIsBF16 ? 6 : 9;
    constexpr uint32_t kMask = 0x00070007u << kMagnitude;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int shift = kMagnitude - 4 * i;
      const uint32_t magnitude = (shift < 0 ? word >> -shift : word << shift) & kMask;
      a[i] = ptx::and_or<0x80008000u>(word << (12 - 4 * i), magnitude);
      if constexpr (T::kIsBF16) {
        // 2^127: table() has the values doubled.
        const __nv_bfloat162 value =
            __hmul2(reinterpret_cast<const __nv_bfloat162&>(a[i]), __float2bfloat162_rn(0x1p127f));
        a[i] = reinterpret_cast<const uint32_t&>(value);
      }
    }
  }

  template <uint32_t kMask>
  __device__ __forceinline__ static uint32_t place(uint32_t value) {
    if constexpr (kMagic == 0) return value & kMask;
    return ptx::and_or<kMask>(value, kMagic);
  }
};

}  // namespace jax_qgemm
