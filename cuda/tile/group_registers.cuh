// The per-group values of a lane's two rows over a stage of k, held in registers as they lie in memory.
#pragma once

#include <iterator>

#include "formats/format.cuh"
#include "formats/tile_codes.cuh"

namespace jax_qgemm {

// Elements of k of one stage: a super-block, or two tiles.
template <class F>
constexpr int kStageOf = F::kKBlock > 128 ? F::kKBlock : 128;

template <int Words>
__device__ __forceinline__ void load_words(uint32_t* out, const void* address) {
  if constexpr (Words % 4 == 0) {
#pragma unroll
    for (int i = 0; i < Words / 4; ++i) {
      const uint4 v = __ldg(static_cast<const uint4*>(address) + i);
      out[4 * i] = v.x, out[4 * i + 1] = v.y, out[4 * i + 2] = v.z, out[4 * i + 3] = v.w;
    }
  } else if constexpr (Words == 2) {
    const uint2 v = __ldg(static_cast<const uint2*>(address));
    out[0] = v.x, out[1] = v.y;
  } else {
    out[0] = __ldg(static_cast<const uint32_t*>(address));
  }
}

// Formats whose groups are known at compile time: each plane's pairs of a k-block are consecutive, one or two loads.
template <class F>
struct GroupRegisters {
  static constexpr int kStage = kStageOf<F>, kBlocks = kStage / F::kKBlock;
  static constexpr int kFirst = F::kHighBits ? 2 : 1, kCount = static_cast<int>(std::size(F::kPlanes)) - kFirst;

  // 32-bit words that a k-block's pairs of group plane i take.
  static constexpr int words(int i) {
    return F::kKBlock / F::kPlanes[kFirst + i].group * F::kPlanes[kFirst + i].bits / 16;
  }
  static constexpr int offset(int i) {
    int sum = 0;
    for (int j = 0; j < i && j < kCount; ++j) sum += words(j) * kBlocks;
    return sum;
  }

  uint32_t raw[offset(kCount)];

  // Index of the pair of a lane's two rows in its row of tiles' first k-block.
  __device__ __forceinline__ static uint32_t first_pair(const Weight&, int row, int k_blocks, int g) {
    return static_cast<uint32_t>(row * k_blocks * 8 + g);
  }

  // first: first_pair() of the row.
  template <int, int I = 0>
  __device__ __forceinline__ void load(const Weight& w, uint32_t first, int k_blocks, int stage) {
    if constexpr (I < kCount) {
      const auto* pairs = static_cast<const uint32_t*>(w.planes[kFirst + I]) +
                          static_cast<uint64_t>(first + stage * (kBlocks * 8)) * words(I);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        // Behind the last k-block, where x is zero, any values do: those of the block before.
        const int block = b == 0 || stage * kBlocks + b < k_blocks ? b : 0;
        load_words<words(I)>(raw + offset(I) + b * words(I), pairs + block * 8 * words(I));
      }
      load<0, I + 1>(w, first, k_blocks, stage);
    }
  }

  // The reader's side of affine_at(); plane and index are constants once loops are unrolled.
  template <class T>
  __device__ __forceinline__ Pair<T> pair(int plane, int index) const {
    // The plane table is the host's: it may be read at compile time only.
    constexpr int kOffsets[] = {0, offset(1), offset(2), offset(3)};
    const uint32_t word = raw[kOffsets[plane - kFirst] + index * static_cast<int>(sizeof(T)) / 4];
    if constexpr (sizeof(T) == 2) return {{static_cast<T>(word), static_cast<T>(word >> 16)}};
    const int shift = index % 4 * 8;
    return {{static_cast<T>(word >> shift), static_cast<T>(word >> (shift + 8))}};
  }

  // Of k-step `step`, where `GroupSteps` of them share a scale.
  template <int GroupSteps>
  __device__ __forceinline__ AffinePair affine(const Weight&, int step) const {
    return F::affine_at(*this, step / GroupSteps * 2, 0);
  }
};

// Integer formats: 1, 2 or 4 groups a stage (sizes of 32 and more, or per channel), 16-bit scales.
template <class F>
  requires(F::kGroup == 0)
struct GroupRegisters<F> {
  uint32_t scales[4];  // a pair each
  uint32_t zeros[2];   // two pairs of bytes each

  __device__ __forceinline__ static uint32_t first_pair(const Weight& w, int row, int k_blocks, int g) {
    return static_cast<uint32_t>(row * (w.group == 0 ? 1 : k_blocks) * 8 + g);
  }

  // first: first_pair() of the row. GroupSteps: k-steps that share a scale; 0: known at run time only.
  template <int GroupSteps>
  __device__ __forceinline__ void load(const Weight& w, uint32_t first, int k_blocks, int stage) {
    if (GroupSteps == 2 || (GroupSteps == 0 && w.group == 32)) {
      load_halves<true>(w, first, k_blocks, stage);
    } else if (GroupSteps == 4 || (GroupSteps == 0 && w.group == 64)) {
      load_halves<false>(w, first, k_blocks, stage);
    } else {
      const uint32_t pair = first + (w.group == 0 ? 0 : w.group == 256 ? stage / 2 : stage) * 8;
      scales[0] = __ldg(static_cast<const uint32_t*>(w.planes[F::kScales]) + pair);
      if (has_zero_points(w)) zeros[0] = __ldg(static_cast<const uint16_t*>(w.planes[F::kScales + 1]) + pair);
    }
  }

  // Of k-step `step`, where `GroupSteps` of them share a scale. The index must be a constant for the arrays to stay in
  // registers.
  template <int GroupSteps>
  __device__ __forceinline__ AffinePair affine(const Weight& w, int step) const {
    const int quarter = GroupSteps == 2 ? step / 2 : GroupSteps == 4 ? step / 4 * 2 : 0;
    return decode(w, scales[quarter], zeros[quarter / 2] >> (quarter % 2 * 16));
  }
  // The same for a number of steps known at run time only.
  __device__ __forceinline__ AffinePair affine_of_any(const Weight& w, int step) const {
    const int quarter = step / 2;
    const uint32_t of_half = w.group == 64 ? scales[quarter / 2 * 2] : scales[0];
    const uint32_t zeros_of_half = w.group == 64 ? zeros[quarter / 2] : zeros[0];
    return decode(w, w.group == 32 ? scales[quarter] : of_half,
                  w.group == 32 ? zeros[quarter / 2] >> (quarter % 2 * 16) : zeros_of_half);
  }

 private:
  // The two k-blocks of a stage, of one group or two.
  template <bool TwoGroups>
  __device__ __forceinline__ void load_halves(const Weight& w, uint32_t first, int k_blocks, int stage) {
    const auto* scale_pairs = static_cast<const uint32_t*>(w.planes[F::kScales]);
    const void* zero_pairs = w.planes[F::kScales + 1];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      // Behind the last k-block, where x is zero, any values do: those of the block before.
      const uint32_t pairs = first + (b == 0 || stage * 2 + b < k_blocks ? stage * 2 + b : stage * 2) * 8;
      if constexpr (TwoGroups) {
        const uint2 two = __ldg(reinterpret_cast<const uint2*>(scale_pairs) + pairs);
        scales[2 * b] = two.x, scales[2 * b + 1] = two.y;
        if (has_zero_points(w)) zeros[b] = __ldg(static_cast<const uint32_t*>(zero_pairs) + pairs);
      } else {
        scales[2 * b] = __ldg(scale_pairs + pairs);
        if (has_zero_points(w)) zeros[b] = __ldg(static_cast<const uint16_t*>(zero_pairs) + pairs);
      }
    }
  }

  struct OnePair {
    uint32_t scale, zero;
    ScaleType scale_type;
    bool zero_points;

    __device__ __forceinline__ bool has_plane(int) const { return zero_points; }
    template <class T>
    __device__ __forceinline__ Pair<T> pair(int, int) const {
      if constexpr (sizeof(T) == 1) return {{static_cast<T>(zero), static_cast<T>(zero >> 8)}};
      return {{static_cast<T>(scale), static_cast<T>(scale >> 16)}};
    }
  };
  __device__ __forceinline__ static bool has_zero_points(const Weight& w) { return w.has_plane(F::kScales + 1); }
  __device__ __forceinline__ static AffinePair decode(const Weight& w, uint32_t scale, uint32_t zero) {
    // Never float32, so that there is no branch for it.
    const ScaleType type = w.scale_type == ScaleType::kBF16 ? ScaleType::kBF16 : ScaleType::kF16;
    return F::affine_at(OnePair{scale, zero, type, has_zero_points(w)}, 0, 0);
  }
};

// Whether they hold the weight's values: integer groups of 16 and float32 scales would take more registers.
template <class F>
bool fits_group_registers(const Weight& w) {
  return F::kGroup != 0 || ((w.group == 0 || w.group >= 32) && w.scale_type != ScaleType::kF32);
}

}  // namespace jax_qgemm
