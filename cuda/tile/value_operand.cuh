// Weights themselves as the A operand of an mma: of 16-bit values, not of integers.
#pragma once

#include <type_traits>

#include "tile/a_operand.cuh"

namespace jax_qgemm {

// Pairs of 16-bit numbers in a register, as packed instructions take them.
template <class T>
struct Packed {
  using Vector = std::conditional_t<T::kIsBF16, __nv_bfloat162, __half2>;

  uint32_t bits;

  __device__ __forceinline__ Vector vector() const { return reinterpret_cast<const Vector&>(bits); }
  __device__ __forceinline__ static Packed of(Vector v) { return {reinterpret_cast<const uint32_t&>(v)}; }
  __device__ __forceinline__ static Packed of(float a, float b) {
    if constexpr (T::kIsBF16) {
      return of(__floats2bfloat162_rn(a, b));
    } else {
      return of(__floats2half2_rn(a, b));
    }
  }
  // Twice the same number; beyond T's range the largest one.
  __device__ __forceinline__ static Packed twice(float value) { return {ptx::twice_saturated<T::kIsBF16>(value)}; }
  __device__ __forceinline__ float first() const {
    const auto half = static_cast<uint16_t>(bits);
    return T::kIsBF16 ? bf16_to_f32(half) : f16_to_f32(half);
  }
  __device__ __forceinline__ float second() const { return Packed{bits >> 16}.first(); }
  // Twice the first (0) or the second (1) number: the instruction that uses it takes it from where it is.
  __device__ __forceinline__ Packed twice(int which) const {
    if constexpr (T::kIsBF16) {
      return of(which ? __high2bfloat162(vector()) : __low2bfloat162(vector()));
    } else {
      return of(which ? __high2half2(vector()) : __low2half2(vector()));
    }
  }

  __device__ __forceinline__ friend Packed operator+(Packed a, Packed b) { return of(__hadd2(a.vector(), b.vector())); }
  __device__ __forceinline__ friend Packed operator-(Packed a, Packed b) { return of(__hsub2(a.vector(), b.vector())); }
  __device__ __forceinline__ friend Packed operator*(Packed a, Packed b) { return of(__hmul2(a.vector(), b.vector())); }
  __device__ __forceinline__ friend Packed fma(Packed a, Packed b, Packed c) {
    return of(__hfma2(a.vector(), b.vector(), c.vector()));
  }
};

// Exact: the operand is level - zero or the 4-bit float, which both types hold, and sums are multiplied by the scale;
// of formats without minimums and larger tables.
//
// Else one sum runs over all of k, whatever the groups: the operand is the weight, rounded once to x's type. Packed:
// two values at a time, level - zero is made exactly and then multiplied by the scale. That takes a scale of 16 bits,
// and what is rounded with it moves all weights of a group together, which adds up where x has a mean: a scale that
// needs more bits is the sum of two numbers. A minimum is added by the same instruction, where it and the scale are
// float16 as x is. Else, in float32: a scale and a minimum that are products, as in k-quants.
//
// In f16 a weight below 2^-25 becomes zero and one above 65504 infinite, but where the scale alone is above: that
// counts as 65504, since infinity times level - zero = 0 would be no number. bf16 has float32's range.
//
// Bytes: tables are looked up by the byte, which takes fewer instructions, not by the 16-bit number.
template <class F, class T, bool kExact = false, bool Bytes = false>
class ValueOperand {
  static constexpr bool kFloat4 = requires { F::kIsE2M1; }, kTable = F::kHasTable && !kFloat4;
  static constexpr bool kTableBytes = kTable && Bytes;
  static_assert(!kExact || (!F::kHasMinimum && !kTable && F::kKBlock != 256));
  static constexpr bool kProducts = F::kKBlock == 256;  // of a float16 scale with a small integer
  static constexpr bool kFloat32 = !F::kHasTable && (kProducts || (F::kHasMinimum && T::kIsBF16));
  static constexpr bool kNibbles = F::kLowBits == 4 && F::kHighBits == 0 && !F::kHasTable;
  static constexpr bool kWide = T::kIsBF16 && F::kLowBits == 8;  // 128 + level would not fit bf16's 8 significant bits
  static constexpr bool kScaleOfTwo = !kFloat4 && (T::kIsBF16 || kProducts);
  static constexpr uint32_t kMagic = T::kIsBF16 ? 0x43004300u : 0x64006400u;  // 128 or 1024, plus the lowest bits

  using V = Packed<T>;

 public:
  // What the weights of a group need, of rows g and g+8.
  struct PackedRow {
    V zero, scale;
    V rest;  // the minimum, or the second number of the scale
  };
  struct Float32Row {
    float scale, rest;
  };
  using Row = std::conditional_t<kFloat32, Float32Row, PackedRow>;
  struct Group {
    Row row[2];
  };

  // What sums of rows g (0) and g+8 (1) are in units of.
  __device__ __forceinline__ static constexpr float unit(int row) {
    if (kExact && kFloat4) return AOperand<F, T, false>::kUnit;
    return kExact && kNibbles && T::kIsBF16 && row == 1 ? 4.0f : 1.0f;
  }

  __device__ __forceinline__ static Group prepare(const AffinePair& affine) {
    return {prepare_row<0>(affine.row[0]), prepare_row<1>(affine.row[1])};
  }

  __device__ __forceinline__ static void decode(uint32_t (&a)[4], const LaneCodes<F>& codes, int step,
                                                const Group& group) {
    if constexpr (kFloat4) {
      AOperand<F, T, false>::decode(a, codes, step, {});
      if constexpr (kExact) return;
      const V unit = V::twice(AOperand<F, T, false>::kUnit);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = weight(T::kIsBF16 ? V{a[i]} : V{a[i]} * unit, group.row[i % 2]);
    } else if constexpr (kTableBytes) {
      TableOperand<F, T, true, T::kIsBF16 ? 0 : kMagic>::decode(a, codes.low.words[step]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Row& row = group.row[i % 2];
        // In bf16 levels as they stand are multiples of 2^-133; a 64th of the difference results.
        const V difference = T::kIsBF16 ? fma(V{a[i]}, {0x7f007f00u}, row.zero) : V{a[i]} + row.zero;
        a[i] = weight(difference, row);
      }
    } else if constexpr (kTable) {
      TableOperand<F, T, false>::decode(a, codes.low.words[step]);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = weight({a[i]}, group.row[i % 2]);
    } else if constexpr (kNibbles && !kFloat32) {
      const Row &low = group.row[0], &high = group.row[1];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = codes.low.words[step] >> 8 * i;
        a[2 * i] = weight(V{ptx::and_or<0x000f000fu>(word, kMagic)} + low.zero, low);
        a[2 * i + 1] = weight(high_nibbles(word, high.zero), high);
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t levels = codes.levels(2 * step + h);  // of elements k, k+8, k+1, k+9
        const Row& row = group.row[h];
        if constexpr (kFloat32) {
          a[h] = V::of(value<0>(levels, row), value<2>(levels, row)).bits;
          a[h + 2] = V::of(value<1>(levels, row), value<3>(levels, row)).bits;
        } else if constexpr (kWide) {
          const uint32_t qvalues = levels ^ 0x80808080u;  // in two's complement, as such formats store them
          a[h] = weight(difference_of_bytes(qvalues, row.zero), row);
          a[h + 2] = weight(difference_of_bytes(qvalues >> 8, row.zero), row);
        } else {
          a[h] = weight(V{ptx::and_or<0x00ff00ffu>(levels, kMagic)} + row.zero, row);
          a[h + 2] = weight(V{__byte_perm(levels, kMagic, 0x5351)} + row.zero, row);
        }
      }
    }
  }

 private:
  template <int H>
  __device__ __forceinline__ static Row prepare_row(const Affine& affine) {
    if constexpr (kFloat32) {
      return {affine.scale, fmaf(-(128.0f + static_cast<float>(affine.zero)), affine.scale, affine.minimum)};
    } else {
      constexpr bool kHigh = kNibbles && H == 1;
      const auto zero = static_cast<uint32_t>(affine.zero);
      Row row = {};
      if constexpr (kWide) {
        row.zero = V::twice(static_cast<float>(128 - affine.zero));
      } else if constexpr (kTableBytes && T::kIsBF16) {
        row.zero = V::twice(-0x1p-6f * static_cast<float>(affine.zero));
      } else if constexpr (kHigh && T::kIsBF16) {
        row.zero = V::twice(-0.25f * static_cast<float>(affine.zero));
      } else if constexpr (kHigh) {
        row.zero = {(0xd400u + 16 * zero) * 0x00010001u};  // -(64 + zero)
      } else {
        row.zero = {(0x8000u + (kMagic & 0xffffu) + zero) * 0x00010001u};
      }
      if constexpr (kExact) return row;
      const float scale = affine.scale * (!T::kIsBF16 ? 1.0f : kTableBytes ? 64.0f : kHigh ? 4.0f : 1.0f);
      row.scale = V::twice(scale);
      if constexpr (F::kHasMinimum) {
        row.rest = V::twice(affine.minimum);
      } else if constexpr (kScaleOfTwo) {
        row.rest = V::twice(scale - row.scale.first());
      }
      return row;
    }
  }

  __device__ __forceinline__ static uint32_t weight(V difference, const PackedRow& row) {
    if constexpr (kExact) return difference.bits;
    if constexpr (F::kHasMinimum) return fma(difference, row.scale, row.rest).bits;
    if constexpr (kScaleOfTwo) return fma(difference, row.scale, difference * row.rest).bits;
    return (difference * row.scale).bits;
  }

  // e: 0 to 3, the byte of `levels`, which becomes the lowest bits of the float 128.
  template <uint32_t e>
  __device__ __forceinline__ static float value(uint32_t levels, const Float32Row& row) {
    return fmaf(__uint_as_float(__byte_perm(levels, 0x43000000u, 0x7044u | e << 8)), row.scale, row.rest);
  }

  // Nibbles 1 and 5 of the word, less the zero. In f16 they are 16 times the lowest bits of 1024. In bf16, whose
  // exponent fields 0 and 1 are one linear range, they are multiples of 2^-129 as they stand; a fourth of the
  // difference results.
  __device__ __forceinline__ static V high_nibbles(uint32_t word, V zero) {
    if constexpr (T::kIsBF16) return fma({word & 0x00f000f0u}, {0x7f007f00u}, zero);
    return fma({ptx::and_or<0x00f000f0u>(word, kMagic)}, {0x2c002c00u}, zero);
  }

  // Bytes 0 and 2, in two's complement: the low 7 bits, plus 128, minus 128 or 256.
  __device__ __forceinline__ static V difference_of_bytes(uint32_t word, V zero) {
    const V qvalue = V{ptx::and_or<0x007f007fu>(word, kMagic)} - V{ptx::and_or<0x00800080u>(word, kMagic)};
    return F::kGroup == 0 ? qvalue + zero : qvalue;
  }
};

}  // namespace jax_qgemm
