// Copies of a warp's next stages of a weight into shared memory, where the same lanes read them with FromShared. What
// is under way takes no registers, and is waited for in its order.
#pragma once

#include <algorithm>

#include "tile/lane_stage.cuh"

namespace jax_qgemm {

// Stages of a warp under way: about 4 KB.
template <class F>
constexpr int kCopyDepth = std::clamp(32 / ((F::kLowBits + F::kHighBits) * kStageTiles<F>), 2, 4);

// How the groups of a format lie over k: k-steps of 16 that share a scale, at most those of 128 k, and whether there
// are zero points. Both are run-time values of integer formats alone; kernels that count instructions have them as
// constants.
template <int GroupSteps, bool ZeroPoints>
struct Grouping {
  static constexpr int kSteps = GroupSteps;
  static constexpr bool kZeroPoints = ZeroPoints;
};

// The weight, knowing at compile time what the grouping says.
template <class F, class G>
__device__ __forceinline__ Weight with_grouping(Weight w) {
  if constexpr (F::kGroup == 0) {
    if constexpr (!G::kZeroPoints) w.planes[F::kScales + 1] = nullptr;
    w.scale_type = static_cast<ScaleType>(ptx::opaque(static_cast<int>(w.scale_type)));
  }
  return w;
}

// Pointers to a lane's words of stage 0 of one row of tiles, for each plane. Those of another stage are a constant
// distance for each stage further on, so are those of the next row.
template <class F, class G>
struct StageCopier {
  static constexpr int kCodePlanes = F::kHighBits ? 2 : 1;
  static constexpr int kPlanes = [] {
    if constexpr (F::kGroup == 0) return kCodePlanes + 1 + G::kZeroPoints;
    return static_cast<int>(std::size(F::kPlanes));
  }();
  // Blocks of k that a stage's group values come in: one behind the other in memory, of 8 pairs of rows each.
  static constexpr int kBlocks = F::kGroup == 0 ? (G::kSteps < 8 ? 2 : 1) : kStageOf<F> / F::kKBlock;
  // A stage whose second half does not exist is possible.
  static constexpr bool kHasHalves = F::kKBlock != kStageOf<F>;

  // Bytes of a plane: of a tile of codes, or of a block's values for one pair of rows. consteval: the table of planes
  // is the host's, and nvcc compiles a read of it at run time to a trap, without a word.
  static consteval int unit_bytes(int plane) {
    if (plane < kCodePlanes) return 128 * (plane == 0 ? F::kLowBits : F::kHighBits);
    if constexpr (F::kGroup == 0) {
      const int pairs = G::kSteps == 2 ? 2 : 1;
      return plane == kCodePlanes ? 4 * pairs : 2 * pairs;
    } else {
      return F::kKBlock / F::kPlanes[plane].group * F::kPlanes[plane].bits / 4;
    }
  }
  static consteval int stage_bytes(int plane) {
    return plane < kCodePlanes ? kStageTiles<F> * unit_bytes(plane) : kBlocks * 8 * unit_bytes(plane);
  }

  // Of shared memory, a warp: a lane's two bytes take a word.
  static consteval int bytes() {
    int bytes = 0;
    for (int plane = 0; plane < kPlanes; ++plane) {
      bytes += plane < kCodePlanes ? stage_bytes(plane) : kBlocks * 32 * std::max(4, unit_bytes(plane));
    }
    return bytes;
  }

  const char* at[kPlanes];
  int stage_shift = 0;  // of integer formats, from a stage to its group: groups of 256 span two, a channel all

  // row: of tiles, over all weights.
  __device__ __forceinline__ StageCopier(const Weight& w, int row, int k_tiles, int k_blocks, int lane) {
    each_plane([&](auto plane) __attribute__((always_inline)) {
      constexpr int kPlane = decltype(plane)::value, kUnit = unit_bytes(kPlane);
      constexpr int kLane = kPlane < kCodePlanes ? (kUnit < 512 ? kUnit / 32 : 16) : kUnit;
      const int index = kPlane < kCodePlanes ? lane : kUnit == 2 ? lane >> 3 << 1 : lane >> 2;
      at[kPlane] = static_cast<const char*>(w.planes[kPlane]) + index * kLane +
                   static_cast<int64_t>(row) * row_bytes<kPlane>(w, k_tiles, k_blocks);
    });
    if constexpr (F::kGroup == 0 && G::kSteps == 8) stage_shift = w.group == 0 ? 31 : w.group == 256;
  }

  __device__ __forceinline__ void advance(const Weight& w, int rows, int k_tiles, int k_blocks) {
    each_plane([&](auto plane) __attribute__((always_inline)) {
      constexpr int kPlane = decltype(plane)::value;
      at[kPlane] += static_cast<int64_t>(rows) * row_bytes<kPlane>(w, k_tiles, k_blocks);
    });
  }

  // In the order of LaneStage::load.
  __device__ __forceinline__ void copy(ptx::SharedAddress to, int stage, int k_tiles, int lane) const {
    // Behind the last tile, where x is zero, are zeros.
    const bool whole = !kHasHalves || (stage + 1) * kStageTiles<F> <= k_tiles;
#pragma unroll
    for (int tile = 0; tile < kStageTiles<F>; ++tile) {
      copy_words<0>(to, stage, tile, tile == 0 || whole, lane);
      if constexpr (kCodePlanes == 2) copy_words<1>(to, stage, tile, tile == 0 || whole, lane);
    }
    const int groups = stage >> stage_shift;
    if constexpr (F::kGroup == 0) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        each_group_plane([&](auto plane) __attribute__((always_inline)) {
          copy_words<decltype(plane)::value>(to, groups, block, block == 0 || whole, lane);
        });
      }
    } else {
      each_group_plane([&](auto plane) __attribute__((always_inline)) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          copy_words<decltype(plane)::value>(to, groups, block, block == 0 || whole, lane);
        }
      });
    }
  }

 private:
  template <class Function, int... I>
  __device__ __forceinline__ static void each(Function&& function, std::integer_sequence<int, I...>) {
    (function(std::integral_constant<int, I>()), ...);
  }
  template <class Function>
  __device__ __forceinline__ static void each_plane(Function&& function) {
    each(function, std::make_integer_sequence<int, kPlanes>());
  }
  template <class Function>
  __device__ __forceinline__ static void each_group_plane(Function&& function) {
    each([&](auto i) __attribute__((
             always_inline)) { function(std::integral_constant<int, kCodePlanes + decltype(i)::value>()); },
         std::make_integer_sequence<int, kPlanes - kCodePlanes>());
  }

  template <int kPlane>
  __device__ __forceinline__ static int row_bytes(const Weight& w, int k_tiles, int k_blocks) {
    if constexpr (kPlane < kCodePlanes) return k_tiles * unit_bytes(kPlane);
    const bool per_channel = F::kGroup == 0 && G::kSteps == 8 && w.group == 0;
    return (per_channel ? 1 : k_blocks) * 8 * unit_bytes(kPlane);
  }

  // A lane's words of tile `unit` of a stage's codes, or of block `unit` of its values. Two bytes, a pair of zero
  // points, come with their neighbours'.
  template <int kPlane>
  __device__ __forceinline__ void copy_words(ptx::SharedAddress& to, int stage, int unit, bool exists, int lane) const {
    constexpr bool kCodes = kPlane < kCodePlanes;
    constexpr int kBytes = kCodes ? unit_bytes(kPlane) / 32 : unit_bytes(kPlane);
    constexpr int kPiece = kBytes < 4 ? 4 : kBytes < 16 ? kBytes : 16;
    constexpr int kDistance = kCodes ? 32 * kPiece : kPiece;                     // between a lane's pieces
    constexpr int kUnit = kCodes ? unit_bytes(kPlane) : 8 * unit_bytes(kPlane);  // between tiles or blocks
    const char* from = at[kPlane] + static_cast<int64_t>(stage) * stage_bytes(kPlane) + unit * kUnit;
#pragma unroll
    for (int i = 0; i * kPiece < kBytes; ++i) {
      if (unit == 0) {
        ptx::copy_async<kPiece>(to + lane * kPiece, from + i * kDistance);
      } else {
        ptx::copy_async<kPiece>(to + lane * kPiece, from + i * kDistance, exists);
      }
      to += 32 * kPiece;
    }
  }
};

}  // namespace jax_qgemm
