// What a lane holds of the super-blocks of its two rows: see SubScaledOperand.
#pragma once

#include <iterator>

#include "tile/staged_weight.cuh"
#include "tile/sub_scaled_operand.cuh"

namespace jax_qgemm {

// A super-block is two stages of 128 k, of which each has all of its group planes.
template <class F, class T, class Staged>
class SuperBlock {
  using Operand = SubScaledOperand<F, T>;
  static constexpr int kFirst = kCodePlanes<F>;  // the sub-scales
  static constexpr int kSubMinimums = kFirst + (F::kSubsShareBytes ? 0 : 1);
  static constexpr int kScales = kFirst + (F::kHasMinimum && !F::kSubsShareBytes ? 2 : 1), kMinimums = kScales + 1;
  static constexpr int kWords = 2 * Operand::kWords;  // of sub-scales, a stage

 public:
  // From stage kHalf of the super-block, but for codes. The second one's values serve both.
  template <int kHalf>
  __device__ __forceinline__ void load(const Staged& staged, ptx::SharedAddress stage, int lane) {
    ptx::load_shared<kWords>(sub_scales, staged.values(kFirst, stage) + kHalf * kWords * 4);
    if constexpr (kHalf == 1) {
      ptx::load_shared<1>(&scales, staged.values(kScales, stage));
      if constexpr (F::kHasMinimum) {
        ptx::load_shared<1>(&minimums, staged.values(kMinimums, stage));
        const ptx::SharedAddress from = staged.values(kSubMinimums, stage) + lane % kWords * 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) ptx::load_shared<1>(&sub_minimums[i], from + i * kWords * 4);
      }
    }
  }

  __device__ __forceinline__ void load_codes(const Staged& staged, ptx::SharedAddress stage, int tile) {
    staged.load_codes_of(codes[tile], stage, tile);
  }

  // at: k-step of the stage, in their order.
  __device__ __forceinline__ void decode(uint32_t (&a)[4], const Weight&, int at) {
    if (at % Operand::kStepsPerWord == 0) group = Operand::prepare(sub_scales[at / Operand::kStepsPerWord]);
    Operand::decode(a, codes[at / 4], at % 4, group);
  }

  // What sums of row g or g+8 are in units of.
  __device__ __forceinline__ float scale(int row, int) const { return half(scales, row) * Operand::kUnit; }

  // XSums' a, and what its sums are in units of.
  __device__ __forceinline__ void minimum_operand(uint32_t (&a)[4]) const {
    Operand::minimums(a[0], a[1], sub_minimums[0]);
    Operand::minimums(a[2], a[3], sub_minimums[1]);
  }
  __device__ __forceinline__ float minimum(int row) const { return -half(minimums, row); }

 private:
  __device__ __forceinline__ static float half(uint32_t pair, int which) {
    return f16_to_f32(static_cast<uint16_t>(pair >> 16 * which));
  }

  LaneCodes<F> codes[2];
  uint32_t sub_scales[kWords], scales, minimums, sub_minimums[2];
  typename Operand::Group group;
};

}  // namespace jax_qgemm
