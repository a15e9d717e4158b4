// How gemv_sm90 divides a product among thread blocks and warpgroups.
#pragma once

#include <algorithm>

#include "formats/format.cuh"
#include "kernels/grid.cuh"

namespace jax_qgemm {

// Of a thread block, of which a multiprocessor has one: warpgroups that multiply, as many as there are registers for.
// One more warpgroup brings what they read, a warp for each of them.
constexpr int kGemvSm90Warpgroups = 4;
constexpr int kGemvSm90Rows = 64;    // of n, a warpgroup
constexpr int kGemvSm90Stage = 128;  // of k

struct GemvSm90Shape {
  int64_t batch, m, tile_rows, k;
  int stage_bytes;  // of a warpgroup's weights: a slot for a stage
  int tokens;       // of a wgmma, m or more
  double bits;      // of a weight as stored
  int unit;         // stages that are summed before scales are known: a slice has a multiple of them
  int sum_bytes;    // of sums of x over groups, a stage; or 0
};

struct GemvSm90Config {
  int rows, slices;  // warpgroups of a thread block along n and along k
  int cluster;       // thread blocks that split k: 1 or 2
  int depth;         // stages of weights under way, a warpgroup
  int slots;         // for stages of x, a slice
  int buffers;       // of partial sums

  QG_HD int warpgroups() const { return rows * slices; }
};

// What follows from a product and a split of it. The host computes it, so that the kernel finds it all in constant
// memory. A tile of rows is what a warpgroup takes at a time, a pass is what a thread block does.
struct GemvSm90Sizes {
  static constexpr int kScratchFloats = 8 * 68;  // of a warpgroup: 8 tokens of 64 rows, lanes of a warp in 32 banks

  GemvSm90Config config;
  int tokens, tile_rows;
  int steps;                            // stages of a slice
  int sum_bytes;                        // see GemvSm90Shape
  int stage_bytes;                      // see GemvSm90Shape
  int clusters, row_tiles, more_tiles;  // tiles of a cluster, and the clusters that have one more
  int passes_without_more, passes;      // of a cluster; of one that has one more, if any
  int slice_of = 0;                     // of each warpgroup, four bits
  bool x_stays;
  int x, rings, parts, scratch, x_sums, barriers, total;  // how shared memory is divided

  GemvSm90Sizes() = default;
  GemvSm90Sizes(const GemvSm90Shape& shape, const GemvSm90Config& c, int most_clusters)
      : config(c),
        tokens(static_cast<int>(shape.m)),
        tile_rows(static_cast<int>(shape.tile_rows)),
        steps(shape.unit *
              static_cast<int>(divide_up(divide_up(shape.k, kGemvSm90Stage * shape.unit), c.cluster * c.slices))),
        sum_bytes(shape.sum_bytes),
        stage_bytes(shape.stage_bytes) {
    const auto tiles = static_cast<int>(divide_up(tile_rows * int64_t{kTileN}, kGemvSm90Rows));
    clusters = std::max(1, std::min(tiles, most_clusters));
    row_tiles = tiles / clusters;
    more_tiles = tiles % clusters;
    passes_without_more = (row_tiles + c.rows - 1) / c.rows;
    passes = (row_tiles + (more_tiles > 0) + c.rows - 1) / c.rows;
    for (int i = 0; i < c.warpgroups(); ++i) slice_of |= i / c.rows << 4 * i;
    x_stays = c.slots >= steps;
    x = 0;
    rings = x + c.slices * c.slots * shape.tokens * kGemvSm90Stage * 2;
    parts = rings + c.warpgroups() * c.depth * stage_bytes;
    scratch = parts + c.buffers * c.warpgroups() * kGemvSm90Rows * shape.tokens * 4;
    x_sums = scratch + c.warpgroups() * kScratchFloats * 4;
    const int slots_of_x = c.slices * c.slots;
    barriers = x_sums + slots_of_x * sum_bytes;
    total = barriers +
            8 * (2 * slots_of_x + 2 * c.warpgroups() * c.depth + 2 * c.buffers * c.rows + (sum_bytes ? slots_of_x : 0));
  }

  QG_HD int first_tile(int cluster) const {
    return cluster * row_tiles + (cluster < more_tiles ? cluster : more_tiles);
  }
  QG_HD int tiles(int cluster) const { return row_tiles + (cluster < more_tiles ? 1 : 0); }
};

// Estimated cycles. The rates are an H200's, from what plain reads reach and from counting instructions: what matters
// is their ratio.
inline double gemv_sm90_cycles(const GemvSm90Shape& shape, const GemvSm90Sizes& s, int multiprocessors) {
  constexpr double kWeightBytes = 20, kBlockBytes = 40;  // a cycle and multiprocessor: from device memory; at most
  constexpr double kLatency = 1200;                      // of a read
  constexpr double kWgmma = 8;                           // cycles of any wgmma
  constexpr double kDecode = 200, kToken = 3;            // of a warp for a stage, and a row of x with it
  constexpr double kChain = 450;                         // cycles that a warpgroup alone needs for that
  constexpr double kStart = 2500, kPass = 800, kExchange = 600, kSlice = 300;
  const GemvSm90Config& c = s.config;
  const double tile_bytes = kGemvSm90Rows * kGemvSm90Stage * shape.bits / 8;
  const double x_bytes = 2.0 * s.tokens * kGemvSm90Stage;
  const double tiles = s.row_tiles + (s.more_tiles > 0), passes = s.passes;
  // Of the busiest multiprocessor.
  const auto here =
      static_cast<double>(divide_up(int64_t{s.clusters} * c.cluster * shape.batch, int64_t{multiprocessors}));
  const double work = tiles * c.slices * s.steps * here;  // stages of warpgroups
  const double x = (s.x_stays ? 1 : passes) * c.slices * s.steps * here * x_bytes;
  const double total = static_cast<double>(shape.batch) * shape.tile_rows * kTileN * shape.k * shape.bits / 8;
  const double in_flight = c.warpgroups() * std::min(c.depth, s.steps) * tile_bytes;
  const double memory = std::max({total / multiprocessors / kWeightBytes, (work * tile_bytes + x) / kBlockBytes,
                                  work * tile_bytes / in_flight * kLatency});
  const double tensor_cores = work * 8 * (shape.tokens / 2 + kWgmma);
  const double issue = work * (kDecode + kToken * shape.tokens);
  const double chain = here * passes * s.steps * kChain;
  // They overlap, but not perfectly.
  const double most = std::max({memory, tensor_cores, issue, chain});
  const bool waits = c.cluster * c.slices > 1;  // for sums of others: once, or where one buffer must do, in every pass
  return kStart * here + most + (memory + tensor_cores + issue + chain - most) / 8 +
         here * passes * (kPass + (c.slices - 1) * kSlice) + (waits ? (c.buffers == 1 ? passes : 1) * kExchange : 0);
}

// Calls visit(sizes, cycles) for the splits that fit.
template <class Visit>
void for_each_gemv_sm90(const GemvSm90Shape& shape, const DeviceLimits& limits, const Visit& visit) {
  constexpr int kInFlight = 64 << 10;  // bytes of weights, a thread block: what the latency of memory asks for
  const auto consider = [&](GemvSm90Config c) {
    // Weights of a batch share the multiprocessors.
    const int64_t clusters = int64_t{limits.multiprocessors} / c.cluster / shape.batch;
    const auto sizes = [&] { return GemvSm90Sizes(shape, c, static_cast<int>(clusters)); };
    const int steps = sizes().steps;
    const bool takes_turns = sizes().passes > 1 && c.slices * c.cluster > 1;
    const int depth = std::clamp(kInFlight / (c.warpgroups() * shape.stage_bytes), 2, 8);
    for (c.buffers = takes_turns ? 2 : 1; c.buffers > 0; --c.buffers) {
      bool fits = false;
      // What is in flight may be a little less where it would not fit otherwise.
      for (c.depth = depth; !fits && c.depth >= std::max(2, depth - 2); --c.depth) {
        // A ring has three at least, or four where two are read at a time.
        for (const int slots : {steps, 8, 6, 4, shape.sum_bytes ? 4 : 3}) {
          c.slots = std::min(steps, slots);
          const GemvSm90Sizes s = sizes();
          fits = s.total <= limits.shared_bytes;
          if (!fits) continue;
          visit(s, gemv_sm90_cycles(shape, s, limits.multiprocessors));
          break;
        }
      }
    }
  };
  const int64_t stages = divide_up(shape.k, kGemvSm90Stage * shape.unit);
  for (int cluster = 1; cluster <= (stages > 1 && limits.multiprocessors > 1 ? 2 : 1); ++cluster) {
    for (int rows = 1; rows <= kGemvSm90Warpgroups; ++rows) {
      for (int slices = 1; rows * slices <= kGemvSm90Warpgroups && cluster * slices <= stages; ++slices) {
        consider({rows, slices, cluster, 0, 0, 1});
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
