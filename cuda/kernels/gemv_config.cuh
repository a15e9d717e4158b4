// How gemv and gemv_tiles divide a product among thread blocks and warps.
#pragma once

#include <algorithm>

#include "kernels/gemv.cuh"
#include "kernels/gemv_tiles.cuh"
#include "kernels/grid.cuh"

namespace jax_qgemm {

struct GemvShape {
  int64_t batch, m, tile_rows, k_blocks, k_block, k;
  int stage_k, stage_bytes, depth, group_steps;
  double bits;    // of a weight as stored
  int max_warps;  // of a thread block
  bool gated;

  GemvSizes sizes(const GemvConfig& c) const {
    return GemvSizes(m, tile_rows, k_blocks, k_block, k, stage_k, stage_bytes, depth, group_steps, c);
  }
};

template <class F, class G>
GemvShape gemv_shape(const Product& p) {
  return {p.batch,
          p.m,
          p.tile_rows(),
          p.w.k_blocks,
          k_block_of<F>(p.w),
          p.k,
          kStageOf<F>,
          StageCopier<F, G>::bytes(),
          kCopyDepth<F>,
          G::kSteps,
          stored_bits<F>(p.w),
          kGemvMaxWarps<F>,
          p.epilogue.gated};
}

// Estimated cycles of the busiest multiprocessor. The rates are an H200's: what matters is their ratio.
inline double gemv_cycles(const GemvShape& shape, const GemvConfig& c, const GemvSizes& s, int multiprocessors) {
  constexpr double kWeightBytes = 18.5, kXBytes = 48;                 // a cycle, from device memory and from L2
  constexpr double kStart = 5500, kBlock = 150, kClusterBlock = 900;  // of a thread block; of one of its blocks of rows
  constexpr double kBytesToHide = 48 << 10;                           // under way for full speed
  const int clusters = std::max(1, multiprocessors / c.cluster);
  const auto passes = static_cast<double>(divide_up(s.row_blocks, clusters));
  const double stage_bytes = kTileN * shape.stage_k * shape.bits / 8;
  const double under_way = c.row_tiles * c.slices * shape.depth * stage_bytes;
  const double bytes = passes * c.row_tiles * s.steps * c.slices * stage_bytes;
  const double x = 2.0 * s.tokens * s.stages_per_block * shape.stage_k / kXBytes;
  return kStart + passes * (c.cluster == 2 ? kClusterBlock : kBlock) + x +
         bytes / kWeightBytes * std::max(1.0, kBytesToHide / under_way);
}

struct GemvTilesShape {
  int64_t batch, m, tile_rows, k_blocks, k_block, k;
  int stage_k, token_tiles;
  double bits;  // of a weight as stored
  int terms;
  int max_warps;  // of a thread block
  bool gated;

  GemvTilesSizes sizes(const GemvTilesConfig& c) const {
    return GemvTilesSizes(m, tile_rows, k_blocks, k_block, k, stage_k, token_tiles, c);
  }
};

template <class F, int TokenTiles>
GemvTilesShape gemv_tiles_shape(const Product& p, int terms) {
  return {p.batch,
          p.m,
          p.tile_rows(),
          p.w.k_blocks,
          k_block_of<F>(p.w),
          p.k,
          kStageOf<F>,
          TokenTiles,
          stored_bits<F>(p.w),
          terms,
          kGemvTilesMaxWarps<F, TokenTiles>,
          p.epilogue.gated};
}

// The same of gemv_tiles, which issues so many instructions that they count.
inline double gemv_tiles_cycles(const GemvTilesShape& shape, const GemvTilesConfig& c, const GemvTilesSizes& s,
                                int multiprocessors) {
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

// Calls `consider` with every split of a product among the warps of one or two thread blocks.
template <class Shape, class Consider>
void for_each_split(const Shape& shape, bool clusters, Consider&& consider) {
  const auto stages = static_cast<int>(divide_up(shape.k, shape.stage_k));
  const int unit = shape.gated ? 2 : 1;
  for (int cluster = 1; cluster <= (clusters && stages > 1 ? 2 : 1); ++cluster) {
    for (int row_tiles = unit; row_tiles <= shape.max_warps; row_tiles += unit) {
      for (int slices = 1; row_tiles * slices <= shape.max_warps && slices <= stages; ++slices) {
        consider(row_tiles, slices, cluster);
      }
    }
  }
}

// Weights of a batch share the multiprocessors.
inline int multiprocessors_of_weight(int64_t batch, const DeviceLimits& limits) {
  return static_cast<int>(std::max<int64_t>(1, limits.multiprocessors / batch));
}

// The split that gemv_cycles() likes best; row_tiles 0: none fits.
inline GemvConfig choose_gemv(const GemvShape& shape, const DeviceLimits& limits, bool clusters) {
  GemvConfig best = {};
  double best_cycles = 0;
  const int multiprocessors = multiprocessors_of_weight(shape.batch, limits);
  for_each_split(shape, clusters, [&](int row_tiles, int slices, int cluster) {
    const GemvConfig c = {row_tiles, slices, cluster};
    const GemvSizes sizes = shape.sizes(c);
    if (sizes.total > limits.shared_bytes) return;
    const double cycles = gemv_cycles(shape, c, sizes, multiprocessors);
    if (best.row_tiles == 0 || cycles < best_cycles) best = c, best_cycles = cycles;
  });
  return best;
}

inline GemvTilesConfig choose_gemv_tiles(const GemvTilesShape& shape, const DeviceLimits& limits, bool clusters) {
  GemvTilesConfig best = {};
  double best_cycles = 0;
  const int multiprocessors = multiprocessors_of_weight(shape.batch, limits);
  for_each_split(shape, clusters, [&](int row_tiles, int slices, int cluster) {
    GemvTilesConfig c = {row_tiles, slices, cluster, 0, shape.terms};
    const int steps = shape.sizes(c).steps;
    // All of x if it fits, else a ring.
    for (const int slots : {steps, kXRingAhead + 1}) {
      c.slots = std::min(steps, slots);
      const GemvTilesSizes sizes = shape.sizes(c);
      if (sizes.total > limits.shared_bytes) continue;
      const double cycles = gemv_tiles_cycles(shape, c, sizes, multiprocessors);
      if (best.row_tiles == 0 || cycles < best_cycles) best = c, best_cycles = cycles;
      break;
    }
  });
  return best;
}

}  // namespace jax_qgemm
