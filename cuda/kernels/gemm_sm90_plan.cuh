// What the launchers of gemm_sm90 and gemm_sm90_a8 share. S is the kernel's GemmSm90Tiles.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/gemm_sm90_config.cuh"
#include "kernels/gemm_sm90_tiles.cuh"

namespace jax_qgemm {

// The kernels count rows of x, rows of tiles of w and columns of both in 32 bits.
inline bool too_large_for_gemm_sm90(const Product& p) {
  constexpr int64_t kMax = std::numeric_limits<int>::max();
  return p.batch * p.m > kMax - 256 || p.stack.weights * p.tile_rows() > kMax - 32 || p.k > kMax - 256;
}

template <class F, class S>
GemmSm90Walk gemm_sm90_walk(const Product& p, const GemmSm90Shape& shape, const GemmSm90Split& split, int clusters) {
  GemmSm90Walk walk = {};
  walk.stages = static_cast<int>(divide_up(p.k, S::kStageK));
  walk.row_blocks = static_cast<int>(split.row_blocks);
  walk.token_blocks = static_cast<int>(split.token_blocks);
  walk.pairs_per_batch = static_cast<int>(split.pairs_per_batch);
  walk.whole = static_cast<int>(split.whole);
  walk.items = static_cast<int>(split.items);
  walk.tile_rows = static_cast<int>(shape.tile_rows);
  // One turn of the grid reads `group` blocks of x and clusters / group pairs of blocks of rows: the sum is smallest
  // where both are equal.
  const double rows_bytes = clusters * 2 * S::kRows * shape.bits / 8, x_bytes = double{S::kXBytes} / S::kStageK;
  walk.group = std::clamp(static_cast<int>(std::lround(std::sqrt(rows_bytes / x_bytes))), 1, walk.token_blocks);
  walk.boxes = plane_boxes<F>(brought<S>(p.w), S::kRowTiles, S::kTiles);
  return walk;
}

// Describes x and the planes of w to the copy engine. Returns what went wrong, or nullptr.
template <class F, class S>
const char* encode_maps(ProductMaps* maps, const Product& p, const GemmSm90Walk& walk) {
  // Each thread block of a pair brings half of the rows.
  const char* problem = encode_rows(&maps->x, p.x, p.x_type, p.batch * p.m, p.k, S::kTokens / 2);
  Product product = p;
  product.w = brought<S>(p.w);
  return problem ? problem : encode_planes<F>(maps->planes, product, walk.boxes, S::kRowTiles);
}

template <class F, class S, auto kKernel>
const char* launch_pairs(const Product& p, const GemmSm90Shape& shape, const GemmSm90Split& split,
                         const DeviceLimits& limits, int clusters, cudaStream_t stream) {
  const GemmSm90Walk walk = gemm_sm90_walk<F, S>(p, shape, split, clusters);
  ProductMaps maps;
  if (const char* problem = encode_maps<F, S>(&maps, p, walk)) return problem;
  if (const cudaError_t error = allow_shared<kKernel>(S::kShared, limits); error != cudaSuccess) {
    return cudaGetErrorString(error);
  }
  return launch(kKernel, {2 * std::min(walk.items, clusters), 1, S::kThreads, S::kShared, 2}, stream, p, walk, maps);
}

}  // namespace jax_qgemm
