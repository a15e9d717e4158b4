// What a lane holds of a stage of its two rows: see ValueOperand.
#pragma once

#include <algorithm>

#include "tile/staged_weight.cuh"
#include "tile/value_operand.cuh"

namespace jax_qgemm {

// Tiles: of 64 k, a stage; GroupSteps: k-steps that share a scale.
template <class F, class Operand, class Staged, int Tiles, int GroupSteps>
class AffineStage {
  static constexpr int kGroups = std::max(Tiles * 4 / GroupSteps, 1);  // of a stage

 public:
  __device__ __forceinline__ void load(const Staged& staged, ptx::SharedAddress from, int stage) {
#pragma unroll
    for (int i = 0; i < Tiles; ++i) staged.load(tiles[i], from, i, stage * Tiles + i);
  }

  // at: k-step of the stage, in their order.
  __device__ __forceinline__ void decode(uint32_t (&a)[4], const Weight& weight, int at) {
    const int tile = at / 4, step = at % 4;
    if (at % GroupSteps == 0) {
      const AffinePair affine = tiles[tile].affine(weight, step);
      group = Operand::prepare(affine);
#pragma unroll
      for (int h = 0; h < 2; ++h) scales[at / GroupSteps][h] = affine.row[h].scale * Operand::unit(h);
    }
    Operand::decode(a, tiles[tile].codes, step, group);
  }

  // What sums of row g or g+8 over the group of a k-step are in units of.
  __device__ __forceinline__ float scale(int row, int at) const { return scales[at / GroupSteps][row]; }

 private:
  typename Staged::Tile tiles[Tiles];
  typename Operand::Group group;
  float scales[kGroups][2];
};

}  // namespace jax_qgemm
