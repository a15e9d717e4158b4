// Weights of k-quants as the A operand of an mma: integers, whose sums are multiplied by the super-block's scale.
#pragma once

#include "tile/value_operand.cuh"

namespace jax_qgemm {

// The operand is sub-scale * (level - zero) times a power of two. It is exact up to 2048 in f16 and 256 in bf16, beyond
// rounded once. One packed instruction makes it of two levels as they stand: exponent fields 0 and 1 are one linear
// range, so that their bits are the levels times 2^-24 (f16) or 2^-133 (bf16).
template <class F, class T>
class SubScaledOperand {
  static constexpr bool kBF16 = T::kIsBF16;
  static constexpr bool kNibbles = F::kLowBits == 4 && F::kHighBits == 0 && !F::kHasTable;
  static constexpr bool kTwoBits = F::kLowBits == 2 && F::kHighBits == 0;
  static constexpr uint32_t kMagic = kBF16 ? 0x43004300u : 0x64006400u;  // 128 or 1024, plus the lowest bits
  static constexpr float kLevelUnit = kBF16 ? 0x1p-133f : 0x1p-24f;
  static constexpr float kScaleUnit = kBF16 ? 0x1p112f : 1.0f;

  using V = Packed<T>;

 public:
  // 32-bit words of a lane's sub-scales, a tile of 64 k.
  static constexpr int kWords = 32 / F::kGroup;
  static constexpr int kStepsPerWord = 4 / kWords;
  // True sum / sum.
  static constexpr float kUnit = 1.0f / (kLevelUnit * kScaleUnit);

  // Of rows g and g+8; the halves are the two groups of a word of sub-scales.
  struct Group {
    V scale[2], rest[2];  // rest: of no level
  };

  // sub_scales: of both rows, two groups.
  __device__ __forceinline__ static Group prepare(uint32_t sub_scales) {
    Group group;
    constexpr uint32_t kMask = F::kSubsShareBytes ? 0x000f000fu : 0x00ff00ffu;
    if constexpr (F::kSubsAreSigned) sub_scales ^= 0x80808080u;  // 128 more
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Where levels stand further up.
      const float first = kNibbles && h ? 0x1p-4f : kTwoBits && h ? 0x1p-2f : 1.0f;
      const float second = kTwoBits ? first * 0x1p-4f : first;
      if constexpr (kBF16 && F::kSubsAreSigned) {
        // 128 + such a byte would not fit bf16's 8 significant bits.
        const V bytes = {h ? __byte_perm(sub_scales, 0, 0x4341) : sub_scales & 0x00ff00ffu};
        group.scale[h] = fma(bytes, V::of(0x1p127f, 0x1p127f), V::of(-2.0f, -2.0f)) * V::of(0x1p118f, 0x1p118f);
      } else {
        constexpr float kZero = (kBF16 ? 128.0f : 1024.0f) + F::kSubZero + (F::kSubsAreSigned ? 128.0f : 0.0f);
        const V biased = {h == 0 || F::kSubsShareBytes ? ptx::and_or<kMask>(sub_scales >> 8 * h, kMagic)
                                                       : __byte_perm(sub_scales, kMagic, 0x5351)};
        group.scale[h] = fma(biased, V::of(first * kScaleUnit, second * kScaleUnit),
                             V::of(-kZero * first * kScaleUnit, -kZero * second * kScaleUnit));
      }
      if constexpr (F::kZero != 0) {
        group.rest[h] = group.scale[h] * V::of(-F::kZero * kLevelUnit, -F::kZero * kLevelUnit);
      }
    }
    return group;
  }

  __device__ __forceinline__ static void decode(uint32_t (&a)[4], const LaneCodes<F>& codes, int step,
                                                const Group& group) {
    if constexpr (kNibbles || kTwoBits) {
      const uint32_t word = codes.low.words[kNibbles ? step : step / 2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t shifted = word >> 8 * i;
        if constexpr (kNibbles) {
          a[2 * i] = shifted & 0x000f000fu;
          a[2 * i + 1] = shifted & 0x00f000f0u;
        } else if (step % 2 == 0) {
          a[2 * i] = shifted & 0x00030003u;
          a[2 * i + 1] = shifted & 0x000c000cu;
        } else {
          a[2 * i] = shifted & 0x00300030u;
          a[2 * i + 1] = shifted & 0x00c000c0u;
        }
      }
    } else if constexpr (F::kHasTable) {
      TableOperand<F, T, true>::decode(a, codes.low.words[step]);
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t levels = codes.levels(2 * step + h);  // of elements k, k+8, k+1, k+9
        a[h] = levels & 0x00ff00ffu;
        a[h + 2] = __byte_perm(levels, 0, 0x4341);
      }
    }
    const int of_word = step % kStepsPerWord / (kStepsPerWord / 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const V scale = group.scale[i % 2].twice(of_word);
      if constexpr (F::kZero != 0) {
        a[i] = fma(V{a[i]}, scale, group.rest[i % 2].twice(of_word)).bits;
      } else {
        a[i] = (V{a[i]} * scale).bits;
      }
    }
  }

  // Sub-minimums of a lane's two rows and two groups as half of an operand, exact in bf16.
  __device__ __forceinline__ static void minimums(uint32_t& low, uint32_t& high, uint32_t word) {
    using B = Packed<MmaBF16>;
    constexpr uint32_t kMask = F::kSubsShareBytes ? 0x000f000fu : 0x007f007fu, kMagic = 0x43004300u;
    if constexpr (F::kSubsShareBytes) word >>= 4;
    low = (B{ptx::and_or<kMask>(word, kMagic)} - B{kMagic}).bits;
    high = (B{ptx::and_or<kMask>(word >> 8, kMagic)} - B{kMagic}).bits;
  }
};

}  // namespace jax_qgemm
