// What a lane holds in registers of 16 rows of a weight over a stage of k: codes and per-group values.
#pragma once

#include "tile/group_registers.cuh"
#include "tile/lane_codes.cuh"

namespace jax_qgemm {

template <class F>
constexpr int kStageTiles = kStageOf<F> / kTileK;

// Where a lane's part of a row of tiles begins.
template <class F>
struct LaneRow {
  uint32_t first_vector = 0, first_pair = 0;

  LaneRow() = default;
  __device__ __forceinline__ LaneRow(const Weight& w, int row, int k_tiles, int k_blocks, int lane)
      : first_vector(static_cast<uint32_t>(row * k_tiles * 32 + lane)),
        first_pair(GroupRegisters<F>::first_pair(w, row, k_blocks, lane / 4)) {}

  // Tile i of a stage; k_tiles: of the row, as stored.
  template <class Source = FromDevice>
  __device__ __forceinline__ void load_codes(LaneCodes<F>& codes, const Weight& w, int k_tiles, int stage, int i,
                                             int lane, Source&& source = {}) const {
    // Behind the last tile, where x is zero, any codes do: those of the stage's first.
    const bool exists = i == 0 || F::kKBlock == kStageOf<F> || stage * kStageTiles<F> + i < k_tiles;
    codes.load(w, first_vector + stage * (kStageTiles<F> * 32) + (exists ? i * 32 : 0), lane, source);
  }
  // GroupSteps: of an integer format, the k-steps that share a scale; 0: known at run time only.
  template <int GroupSteps = 0, class Source = FromDevice>
  __device__ __forceinline__ void load_groups(GroupRegisters<F>& groups, const Weight& w, int k_blocks, int stage,
                                              Source&& source = {}) const {
    groups.template load<GroupSteps>(w, first_pair, k_blocks, stage, source);
  }
};

template <class F>
struct LaneStage {
  LaneCodes<F> codes[kStageTiles<F>];
  GroupRegisters<F> groups;

  template <int GroupSteps = 0, class Source = FromDevice>
  __device__ __forceinline__ void load(const Weight& w, const LaneRow<F>& row, int k_tiles, int k_blocks, int stage,
                                       int lane, Source&& source = {}) {
#pragma unroll
    for (int i = 0; i < kStageTiles<F>; ++i) row.load_codes(codes[i], w, k_tiles, stage, i, lane, source);
    row.template load_groups<GroupSteps>(groups, w, k_blocks, stage, source);
  }
};

}  // namespace jax_qgemm
