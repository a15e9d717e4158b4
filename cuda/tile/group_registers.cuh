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

  // row: of tiles of the weight; first_block: of that row, in k-blocks.
  template <int I = 0>
  __device__ __forceinline__ void load(const Weight& w, int row, int first_block, int g, int stage) {
    if constexpr (I < kCount) {
      const int block = stage * kBlocks;
      const auto* pairs = static_cast<const uint32_t*>(w.planes[kFirst + I]) +
                          static_cast<int64_t>((first_block + block) * 8 + g) * words(I);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        uint32_t* out = raw + offset(I) + b * words(I);
        if (kBlocks == 1 || block + b < w.k_blocks) {
          load_words<words(I)>(out, pairs + b * 8 * words(I));
        } else {
#pragma unroll
          for (int j = 0; j < words(I); ++j) out[j] = 0;
        }
      }
      load<I + 1>(w, row, first_block, g, stage);
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

  __device__ __forceinline__ AffinePair affine(const Weight&, int step) const {
    return F::affine_at(*this, step * 16 / F::kGroup * 2, 0);
  }
};

// Integer formats: 1, 2 or 4 groups a stage (sizes of 32 and more, or per channel), 16-bit scales.
template <class F>
  requires(F::kGroup == 0)
struct GroupRegisters<F> {
  static constexpr int kMaxGroups = 4;
  uint32_t scales[kMaxGroups];
  uint32_t zeros[kMaxGroups];
  ScaleType scale_type;
  bool zero_points;

  // row: of tiles of the weight; first_block: of that row, in k-blocks.
  __device__ __forceinline__ void load(const Weight& w, int row, int first_block, int g, int stage) {
    scale_type = w.scale_type;
    zero_points = w.has_plane(F::kScales + 1);
#pragma unroll
    for (int i = 0; i < kMaxGroups; ++i) scales[i] = zeros[i] = 0;
    if (w.group == 0) {
      load_pair_of(w, row * 8 + g, 0);
    } else if (w.group >= 128) {
      load_pair_of(w, (first_block + (w.group == 256 ? stage / 2 : stage)) * 8 + g, 0);
    } else {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int block = stage * 2 + b, index = (first_block + block) * 8 + g;
        if (block >= w.k_blocks) break;
        if (w.group == 64) {
          load_pair_of(w, index, b);
        } else {
          load_pair_of(w, index * 2, 2 * b);
          load_pair_of(w, index * 2 + 1, 2 * b + 1);
        }
      }
    }
  }

  __device__ __forceinline__ void load_pair_of(const Weight& w, int pair, int i) {
    scales[i] = __ldg(static_cast<const uint32_t*>(w.planes[F::kScales]) + pair);
    if (zero_points) zeros[i] = __ldg(static_cast<const uint16_t*>(w.planes[F::kScales + 1]) + pair);
  }

  __device__ __forceinline__ bool has_plane(int) const { return zero_points; }
  template <class T>
  __device__ __forceinline__ Pair<T> pair(int, int index) const {
    if constexpr (sizeof(T) == 1) return {{static_cast<T>(zeros[index]), static_cast<T>(zeros[index] >> 8)}};
    return {{static_cast<T>(scales[index]), static_cast<T>(scales[index] >> 16)}};
  }

  __device__ __forceinline__ AffinePair affine(const Weight& w, int step) const {
    // The index must be a constant for the arrays to stay in registers: choose among the three group counts.
    if (w.group == 32) return F::affine_at(*this, step / 2, 0);
    if (w.group == 64) return F::affine_at(*this, step / 4, 0);
    return F::affine_at(*this, 0, 0);
  }
};

}  // namespace jax_qgemm
