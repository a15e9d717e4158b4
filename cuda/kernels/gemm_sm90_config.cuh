// How gemm_sm90 divides a product.
#pragma once

#include <algorithm>
#include <iterator>

#include "kernels/grid.cuh"
#include "kernels/product.h"

namespace jax_qgemm {

struct GemmSm90Shape {
  int64_t m, tile_rows, k, batch;
  double bits;  // of a stored weight
};

// A tile: rows of x, and blocks of 64 rows of n of each of two warpgroups.
struct GemmSm90Config {
  int tokens, blocks;

  int row_tiles() const { return 8 * blocks; }
  int stage_tiles() const { return tokens == 256 || blocks == 2 ? 1 : 2; }
};

// The result's tiles in pairs, of which the clusters compute `whole` one after the other. Of the others, if any, each
// tile is split over k by a cluster: that pays where there are clusters enough for one turn of it.
struct GemmSm90Split {
  int64_t row_blocks, token_blocks, pairs_per_batch, whole, items;

  template <class Config>
  GemmSm90Split(const GemmSm90Shape& s, const Config& c, int clusters)
      : row_blocks(divide_up(s.tile_rows, c.row_tiles())),
        token_blocks(divide_up(s.m, c.tokens)),
        pairs_per_batch(divide_up(row_blocks, 2) * token_blocks) {
    const int64_t pairs = s.batch * pairs_per_batch, rest = pairs % clusters;
    const bool split = 2 * rest <= clusters && s.k > c.stage_tiles() * kTileK;
    whole = split ? pairs - rest : pairs;
    items = whole + 2 * (pairs - whole);
  }
};

// Estimated cycles.
inline double gemm_sm90_cycles(const GemmSm90Shape& s, const GemmSm90Config& c, int clusters) {
  constexpr double kL2Bytes = 28;                                // a cycle and multiprocessor
  constexpr double kDecode = 300;                                // of 128 rows of w by 64 k
  constexpr double kPerToken = 10, kPerTile = 1500;              // to store a tile, and to fill the pipeline
  const double tensor_cores = c.blocks * 4.0 * (c.tokens + 16);  // eight wgmmas, each with a few cycles of its own
  const double l2 = (c.tokens * kTileK + c.row_tiles() * kTileN * kTileK * s.bits / 8) / kL2Bytes;
  const double tile = static_cast<double>(divide_up(s.k, kTileK)) * std::max({tensor_cores, l2, kDecode * c.blocks});
  const double store = c.blocks * kPerToken * c.tokens + kPerTile;
  const GemmSm90Split split(s, c, clusters);
  return static_cast<double>(divide_up(split.whole, clusters)) * (tile + store) +
         (split.items > split.whole ? tile / 2 + store : 0);
}

inline GemmSm90Config choose_gemm_sm90(const GemmSm90Shape& s, int clusters) {
  constexpr GemmSm90Config kConfigs[] = {{64, 1}, {128, 1}, {256, 1}, {128, 2}};
  return *std::min_element(std::begin(kConfigs), std::end(kConfigs), [&](const auto& a, const auto& b) {
    return gemm_sm90_cycles(s, a, clusters) < gemm_sm90_cycles(s, b, clusters);
  });
}

}  // namespace jax_qgemm
