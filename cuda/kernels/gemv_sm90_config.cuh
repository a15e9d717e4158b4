// How gemv_sm90 divides a product among thread blocks and warpgroups.
#pragma once

#include <algorithm>

#include "formats/format.cuh"
#include "kernels/grid.cuh"

namespace jax_qgemm {

// Warpgroups whose registers a multiprocessor has room for, in one thread block or more.
constexpr int kGemvSm90Warpgroups = 4;
constexpr int kGemvSm90Rows = 64;  // of n, a warpgroup

struct GemvSm90Shape {
  int64_t batch, m, tile_rows, k_blocks, k_tiles, k;  // of a weight; blocks and tiles as stored
  int stage_k, stage_bytes, depth;                    // of the weights of a warp: a stage, and how many are under way
  int tokens;                                         // of a wgmma, m or more
  double bits;                                        // of a weight as stored
};

struct GemvSm90Config {
  int rows, slices;  // warpgroups of a thread block along n and along k
  int cluster;       // thread blocks that split k: 1 or 2
  int slots;         // for 128 k of x, a slice
  int buffers;       // of partial sums

  QG_HD int warpgroups() const { return rows * slices; }
};

// What follows from a product and a split of it. The host computes it, so that the kernel finds it all in constant
// memory. A tile of rows is what a warpgroup takes at a time, a pass is what a thread block does.
struct GemvSm90Sizes {
  static constexpr int kPiece = 128;             // of k in a slot of x
  static constexpr int kScratchFloats = 8 * 68;  // of a warpgroup: 8 tokens of 64 rows, lanes of a warp in 32 banks

  GemvSm90Config config;
  int tokens, tile_rows, k_tiles, k_blocks;
  int stages, steps;                    // of k; of a slice
  int stage_bytes;                      // of the weights of a warp
  int clusters, row_tiles, more_tiles;  // tiles of a cluster, and the clusters that have one more
  bool x_stays;
  int x, parts, scratch, rings, barriers, total;  // how shared memory is divided

  GemvSm90Sizes() = default;
  GemvSm90Sizes(const GemvSm90Shape& shape, const GemvSm90Config& c, int most_clusters)
      : config(c),
        tokens(static_cast<int>(shape.m)),
        tile_rows(static_cast<int>(shape.tile_rows)),
        k_tiles(static_cast<int>(shape.k_tiles)),
        k_blocks(static_cast<int>(shape.k_blocks)),
        stages(static_cast<int>(divide_up(shape.k, shape.stage_k))),
        steps(static_cast<int>(divide_up(stages, c.cluster * c.slices))),
        stage_bytes(shape.stage_bytes) {
    const auto tiles = static_cast<int>(divide_up(tile_rows * int64_t{kTileN}, kGemvSm90Rows));
    clusters = std::max(1, std::min(tiles, most_clusters));
    row_tiles = tiles / clusters;
    more_tiles = tiles % clusters;
    x_stays = c.slots >= pieces(shape);
    x = 0;
    parts = x + c.slices * c.slots * shape.tokens * kPiece * 2;
    scratch = parts + c.buffers * c.warpgroups() * kGemvSm90Rows * shape.tokens * 4;
    rings = scratch + c.warpgroups() * kScratchFloats * 4;
    barriers = rings + c.warpgroups() * 4 * shape.depth * stage_bytes;
    total = barriers + 8 * (2 * c.slices * c.slots + 2 * c.buffers * c.rows);
  }

  int pieces(const GemvSm90Shape& shape) const { return steps * (shape.stage_k / kPiece); }
  QG_HD int first_tile(int cluster) const {
    return cluster * row_tiles + (cluster < more_tiles ? cluster : more_tiles);
  }
  QG_HD int tiles(int cluster) const { return row_tiles + (cluster < more_tiles ? 1 : 0); }
  int passes() const { return (row_tiles + (more_tiles > 0) + config.rows - 1) / config.rows; }
};

// Thread blocks of a multiprocessor.
inline int gemv_sm90_blocks(const GemvSm90Config& c, int shared_bytes, const DeviceLimits& limits) {
  constexpr int kReserved = 1 << 10;  // of shared memory, by the system, a block
  const int fit = (limits.shared_bytes + kReserved) / (shared_bytes + kReserved);
  return std::min(kGemvSm90Warpgroups / c.warpgroups(), fit);
}

// Estimated cycles. The rates are an H200's, from what plain reads reach and from counting instructions: what matters
// is their ratio.
inline double gemv_sm90_cycles(const GemvSm90Shape& shape, const GemvSm90Sizes& s, int blocks, int multiprocessors) {
  constexpr double kWeightBytes = 20, kBlockBytes = 40;  // a cycle and multiprocessor: from device memory; at most
  constexpr double kLatency = 1200;                      // of a read
  constexpr double kWgmma = 8;                           // cycles of any wgmma
  constexpr double kDecode = 330, kToken = 5.5;  // of a warp for a tile of rows by 128 k, and a row of x with it
  constexpr double kChain = 450;                 // cycles that a warpgroup alone needs for that
  constexpr double kStart = 2500, kPass = 800, kExchange = 600, kSlice = 300;
  const GemvSm90Config& c = s.config;
  const double k = static_cast<double>(s.steps) * shape.stage_k, pieces = k / GemvSm90Sizes::kPiece;
  const double tile_bytes = kGemvSm90Rows * GemvSm90Sizes::kPiece * shape.bits / 8;
  const double x_bytes = 2.0 * s.tokens * GemvSm90Sizes::kPiece;
  const double tiles = s.row_tiles + (s.more_tiles > 0), passes = s.passes();
  // Of the busiest multiprocessor.
  const double here = static_cast<double>(
      std::min<int64_t>(blocks, divide_up(int64_t{s.clusters} * c.cluster * shape.batch, multiprocessors)));
  const double work = tiles * c.slices * pieces * here;  // tiles of 64 rows by 128 k
  const double x = (s.x_stays ? 1 : passes) * c.slices * pieces * here * x_bytes;
  const double total = static_cast<double>(shape.batch) * shape.tile_rows * kTileN * shape.k * shape.bits / 8;
  const double in_flight = here * c.warpgroups() * std::min<double>(shape.depth * shape.stage_k, k) / 128 * tile_bytes;
  const double memory = std::max({total / multiprocessors / kWeightBytes, (work * tile_bytes + x) / kBlockBytes,
                                  work * tile_bytes / in_flight * kLatency});
  const double tensor_cores = work * 8 * (shape.tokens / 2 + kWgmma);
  const double issue = work * (kDecode + kToken * shape.tokens);
  const double chain = passes * pieces * kChain;
  // They overlap, but not perfectly.
  const double most = std::max({memory, tensor_cores, issue, chain});
  const bool waits = c.cluster * c.slices > 1;  // for sums of others: once, or where one buffer must do, in every pass
  return kStart + most + (memory + tensor_cores + issue + chain - most) / 8 +
         passes * (kPass + (c.slices - 1) * kSlice) + (waits ? (c.buffers == 1 ? passes : 1) * kExchange : 0);
}

// Calls visit(sizes, cycles) for the splits that fit.
template <class Visit>
void for_each_gemv_sm90(const GemvSm90Shape& shape, const DeviceLimits& limits, const Visit& visit) {
  const auto consider = [&](GemvSm90Config c, int blocks) {
    // Weights of a batch share the multiprocessors.
    const int64_t clusters = int64_t{limits.multiprocessors} * blocks / c.cluster / shape.batch;
    const auto sizes = [&] { return GemvSm90Sizes(shape, c, static_cast<int>(clusters)); };
    const bool takes_turns = sizes().passes() > 1 && c.slices * c.cluster > 1;
    const int pieces = sizes().pieces(shape);
    for (c.buffers = takes_turns ? 2 : 1; c.buffers > 0; --c.buffers) {
      for (const int slots : {pieces, 8, 6, 4, 3}) {  // a ring has three at least
        c.slots = std::min(pieces, slots);
        const GemvSm90Sizes s = sizes();
        if (s.total > limits.shared_bytes || gemv_sm90_blocks(c, s.total, limits) < blocks) continue;
        visit(s, gemv_sm90_cycles(shape, s, blocks, limits.multiprocessors));
        break;
      }
    }
  };
  const auto stages = static_cast<int>(divide_up(shape.k, shape.stage_k));
  for (int cluster = 1; cluster <= (stages > 1 && limits.multiprocessors > 1 ? 2 : 1); ++cluster) {
    for (int rows = 1; rows <= kGemvSm90Warpgroups; ++rows) {
      for (int slices = 1; rows * slices <= kGemvSm90Warpgroups && cluster * slices <= stages; ++slices) {
        for (int blocks = 1; rows * slices * blocks <= kGemvSm90Warpgroups; ++blocks) {
          consider({rows, slices, cluster, 0, 1}, blocks);
        }
      }
    }
  }
}

// The split that gemv_sm90_cycles() likes best; rows 0: none fits.
inline GemvSm90Sizes choose_gemv_sm90(const GemvSm90Shape& shape, const DeviceLimits& limits) {
  GemvSm90Sizes best = {};
  double best_cycles = 0;
  for_each_gemv_sm90(shape, limits, [&](const GemvSm90Sizes& s, double cycles) {
    if (best.config.rows != 0 && cycles >= best_cycles) return;
    best = s;
    best_cycles = cycles;
  });
  return best;
}

}  // namespace jax_qgemm
