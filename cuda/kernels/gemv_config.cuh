// How gemv divides a product among thread blocks and warps.
#pragma once

#include <algorithm>

#include "kernels/gemv.cuh"
#include "kernels/grid.cuh"

namespace jax_qgemm {

struct GemvShape {
  int64_t batch, m, tile_rows, k_blocks, k_block, k;
  int stage_k, token_tiles;
  double bits;  // of a weight as stored
  int terms;
  int max_warps;  // of a thread block
  bool gated;

  GemvSizes sizes(const GemvConfig& c) const {
    return GemvSizes(m, tile_rows, k_blocks, k_block, k, stage_k, token_tiles, c);
  }
};

template <class F, int TokenTiles>
GemvShape gemv_shape(const Product& p, int terms) {
  return {p.batch,     p.m,        p.tile_rows(),       p.w.k_blocks, k_block_of<F>(p.w),           p.k,
          kStageOf<F>, TokenTiles, stored_bits<F>(p.w), terms,        kGemvMaxWarps<F, TokenTiles>, p.epilogue.gated};
}

// Estimated cycles of the busiest multiprocessor. The rates are Hopper's, from what plain reads reach on an H200 and
// from counting instructions: what matters is their ratio.
inline double gemv_cycles(const GemvShape& shape, const GemvConfig& c, const GemvSizes& s, int multiprocessors) {
  constexpr double kWeightBytes = 20, kXBytes = 40;                   // a cycle, from device memory and from L2
  constexpr double kStart = 600, kBlock = 150, kClusterBlock = 500;   // of a thread block; of one of its blocks of rows
  constexpr double kWarpsToHide = 12, kBytesToHide = 20 << 10;        // what has to be under way for full speed
  constexpr double kTileInstructions = 100, kTokenInstructions = 25;  // of 16 x 128 weights; of 8 rows of x with them
  constexpr double kIssue = 3;                                        // instructions a cycle
  const int clusters = std::max(1, multiprocessors / c.cluster);
  const auto passes = static_cast<double>(divide_up(s.row_blocks, clusters));
  // A step that is there only to make their number even loads nothing.
  const double warps = c.row_tiles * c.slices * static_cast<double>(s.steps) / s.even_steps;
  const double k = static_cast<double>(s.steps) * c.slices * shape.stage_k;
  const double tiles = passes * c.row_tiles * k / 128;
  const double memory = tiles * kTileN * 128 * shape.bits / 8 / kWeightBytes;
  const double wanted = std::max(kWarpsToHide, kBytesToHide / (kTileN * shape.stage_k * shape.bits / 8));
  const double issue = tiles * (kTileInstructions + kTokenInstructions * shape.token_tiles) / kIssue;
  const double x = 2.0 * c.terms * s.tokens * k * (c.slots == s.steps ? 1 : passes) / kXBytes;
  return kStart + passes * (c.cluster == 2 ? kClusterBlock : kBlock) +
         std::max(memory * std::max(1.0, wanted / warps), issue * std::max(1.0, kWarpsToHide / warps)) + x;
}

// The split that gemv_cycles() likes best; row_tiles 0: none fits.
inline GemvConfig choose_gemv(const GemvShape& shape, const DeviceLimits& limits, bool clusters) {
  GemvConfig best = {};
  double best_cycles = 0;
  // Weights of a batch share the multiprocessors.
  const auto multiprocessors = static_cast<int>(std::max<int64_t>(1, limits.multiprocessors / shape.batch));
  const auto consider = [&](GemvConfig c) {
    const int steps = shape.sizes(c).steps;
    // All of x if it fits, else a ring.
    for (const int slots : {steps, kXRingAhead + 1}) {
      c.slots = std::min(steps, slots);
      const GemvSizes sizes = shape.sizes(c);
      if (sizes.total > limits.shared_bytes) continue;
      const double cycles = gemv_cycles(shape, c, sizes, multiprocessors);
      if (best.row_tiles == 0 || cycles < best_cycles) {
        best = c;
        best_cycles = cycles;
      }
      break;
    }
  };
  const auto stages = static_cast<int>(divide_up(shape.k, shape.stage_k));
  const int unit = shape.gated ? 2 : 1;
  for (int cluster = 1; cluster <= (clusters && stages > 1 ? 2 : 1); ++cluster) {
    for (int row_tiles = unit; row_tiles <= shape.max_warps; row_tiles += unit) {
      for (int slices = 1; row_tiles * slices <= shape.max_warps && slices <= stages; ++slices) {
        consider({row_tiles, slices, cluster, 0, shape.terms});
      }
    }
  }
  return best;
}

}  // namespace jax_qgemm
