// The per-group values of a lane's two rows over a stage of k, held in registers as they lie in memory.
#pragma once

#include <iterator>

#include "formats/format.cuh"
#include "formats/tile_codes.cuh"
#include "tile/lane_source.cuh"

namespace jax_qgemm {

// Elements of k of one stage: a super-block, or two tiles.
template <class F>
constexpr int kStageOf = F::kKBlock > 128 ? F::kKBlock : 128;

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
  template <int, int I = 0, class Source = FromDevice>
  __device__ __forceinline__ void load(const Weight& w, uint32_t first, int k_blocks, int stage, Source&& source = {}) {
    if constexpr (I < kCount) {
      constexpr int kPiece = words(I) < 4 ? words(I) : 4;
      const auto* pairs = static_cast<const uint32_t*>(w.planes[kFirst + I]) +
                          static_cast<uint64_t>(first + stage * (kBlocks * 8)) * words(I);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        // Behind the last k-block, where x is zero, any values do: those of the block before.
        const int block = b == 0 || stage * kBlocks + b < k_blocks ? b : 0;
#pragma unroll
        for (int j = 0; j < words(I); j += kPiece) {
          source.template words<kPiece>(raw + offset(I) + b * words(I) + j, pairs + block * 8 * words(I) + j);
        }
      }
      load<0, I + 1>(w, first, k_blocks, stage, source);
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

  // 2^15 + a pair of bytes, of which only the bits of Mask from bit Shift up count and those of Flip are inverted: the
  // floats that take least to make of them.
  template <int Shift, uint32_t Mask, uint32_t Flip>
  __device__ __forceinline__ Pair<float> biased_bytes(int plane, int index) const {
    constexpr int kOffsets[] = {0, offset(1), offset(2), offset(3)};
    const uint32_t word = raw[kOffsets[plane - kFirst] + index / 4];
    const uint32_t bytes = ((word ^ 0x01010101u * Flip) >> Shift) & (0x01010101u * Mask);
    const uint32_t selector = 0x7504 | index % 4 << 4;
    return {{float_from_bits(__byte_perm(bytes, 0x47000000u, selector)),
             float_from_bits(__byte_perm(bytes, 0x47000000u, selector + 0x10))}};
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
  template <int GroupSteps, class Source = FromDevice>
  __device__ __forceinline__ void load(const Weight& w, uint32_t first, int k_blocks, int stage, Source&& source = {}) {
    if (GroupSteps == 2 || (GroupSteps == 0 && w.group == 32)) {
      load_halves<true>(w, first, k_blocks, stage, source);
    } else if (GroupSteps == 4 || (GroupSteps == 0 && w.group == 64)) {
      load_halves<false>(w, first, k_blocks, stage, source);
    } else {
      const uint32_t pair = first + (w.group == 0 ? 0 : w.group == 256 ? stage / 2 : stage) * 8;
      source.template words<1>(scales, static_cast<const uint32_t*>(w.planes[F::kScales]) + pair);
      if (has_zero_points(w)) source.half(zeros[0], static_cast<const uint16_t*>(w.planes[F::kScales + 1]) + pair);
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
  template <bool TwoGroups, class Source>
  __device__ __forceinline__ void load_halves(const Weight& w, uint32_t first, int k_blocks, int stage,
                                              Source& source) {
    const auto* scale_pairs = static_cast<const uint32_t*>(w.planes[F::kScales]);
    const void* zero_pairs = w.planes[F::kScales + 1];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      // Behind the last k-block, where x is zero, any values do: those of the block before.
      const uint32_t pairs = first + (b == 0 || stage * 2 + b < k_blocks ? stage * 2 + b : stage * 2) * 8;
      if constexpr (TwoGroups) {
        source.template words<2>(scales + 2 * b, scale_pairs + 2 * pairs);
        if (has_zero_points(w)) source.template words<1>(zeros + b, static_cast<const uint32_t*>(zero_pairs) + pairs);
      } else {
        source.template words<1>(scales + 2 * b, scale_pairs + pairs);
        if (has_zero_points(w)) source.half(zeros[b], static_cast<const uint16_t*>(zero_pairs) + pairs);
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
