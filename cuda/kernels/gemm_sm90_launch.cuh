// From a Product to gemm_sm90.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>

#include "kernels/gemm_sm90.cuh"
#include "kernels/gemm_sm90.h"
#include "kernels/grid.cuh"
#include "tile/tensor_map.cuh"

namespace jax_qgemm {

// Why the product cannot be computed, or nullptr.
template <class F>
const char* gemm_sm90_refusal(const Product& p, const DeviceLimits& limits) {
  constexpr int64_t kMax = std::numeric_limits<int>::max();
  if (limits.capability != 90) return "kernel gemm_sm90 needs a GPU of compute capability 9.0";
  if (p.x_type == Scalar::kF32) return "kernel gemm_sm90 does not serve float32 x";
  if (p.k % 8 != 0 || p.k == 0) return "kernel gemm_sm90 needs a k that is a multiple of 8";
  if (reinterpret_cast<uintptr_t>(p.x) % 16 != 0) return "kernel gemm_sm90 needs x aligned to 16 bytes";
  if (!fits_group_registers<F>(p.w)) return "kernel gemm_sm90 does not serve integer groups of 16 or float32 scales";
  // The kernel counts rows of x, pairs of rows of w and a lane's vectors of codes in 32 bits.
  if (p.batch * p.m > kMax - 256 || p.batch * p.tile_rows() * p.w.k_blocks * (k_block_of<F>(p.w) / 16) * 8 > kMax) {
    return "kernel gemm_sm90 does not serve this product: it is more than it can count";
  }
  return nullptr;
}

// How the result is divided: rows of x of a tile, and thread blocks of a cluster.
struct GemmSm90Config {
  int tokens, cluster;
};

// Estimated cycles of a product: those of 64 k of a tile, times the tiles that the busiest multiprocessor computes.
inline double gemm_sm90_cycles(const Product& p, double bits, const GemmSm90Config& c, int multiprocessors) {
  constexpr double kL2Bytes = 28;  // a cycle and multiprocessor
  constexpr double kDecode = 400;  // of the weights
  constexpr int kRows = 128;
  const double tensor_cores = 4.0 * c.tokens + 80;  // eight wgmmas, each with a few cycles of its own
  const double l2 = (c.tokens * kTileK * 2.0 / c.cluster + kRows * kTileK * bits / 8) / kL2Bytes;
  const int64_t tiles = p.batch * divide_up(p.m, c.tokens) * divide_up(p.tile_rows(), kRows / kTileN * c.cluster);
  return static_cast<double>(divide_up(tiles, multiprocessors / c.cluster)) * std::max({tensor_cores, l2, kDecode});
}

inline GemmSm90Config choose_gemm_sm90(const Product& p, double bits, int multiprocessors) {
  constexpr GemmSm90Config kConfigs[] = {{64, 1}, {128, 1}, {128, 2}, {256, 1}, {256, 2}};
  return *std::min_element(std::begin(kConfigs), std::end(kConfigs), [&](const auto& a, const auto& b) {
    const auto cycles = [&](const auto& c) {
      return c.cluster <= multiprocessors ? gemm_sm90_cycles(p, bits, c, multiprocessors)
                                          : std::numeric_limits<double>::infinity();
    };
    return cycles(a) < cycles(b);
  });
}

template <class S, class F>
GemmSm90Walk gemm_sm90_walk(const Product& p, int cluster, double bits, int multiprocessors) {
  GemmSm90Walk walk = {};
  walk.cluster = cluster;
  walk.tile_rows = static_cast<int>(p.tile_rows());
  walk.k_blocks = static_cast<int>(p.w.k_blocks);
  walk.k_tiles = static_cast<int>(p.w.k_blocks * (k_block_of<F>(p.w) / kTileK));
  walk.stages = static_cast<int>(divide_up(p.k, kStageOf<F>));
  walk.whole_stages = static_cast<int>(divide_up(walk.stages, S::kGroupStages)) * S::kGroupStages;
  walk.row_blocks = static_cast<int>(divide_up(walk.tile_rows, S::kRowTiles * cluster));
  walk.token_blocks = static_cast<int>(divide_up(p.m, S::kTokens));
  // One turn of the grid reads `group` blocks of x and multiprocessors / group blocks of rows: the sum is smallest
  // where both are equal.
  const double rows_bytes = multiprocessors * S::kRowTiles * kTileN * bits / 8, x_bytes = S::kTokens * 2;
  walk.group = std::clamp(static_cast<int>(std::lround(std::sqrt(rows_bytes / x_bytes))), 1, walk.token_blocks);
  walk.items_per_batch = walk.row_blocks * walk.token_blocks;
  walk.items = static_cast<int>(p.batch) * walk.items_per_batch;
  return walk;
}

template <class F, class T, int Tokens>
const char* launch_gemm_sm90_tile(const Product& p, int cluster, const DeviceLimits& limits, cudaStream_t stream) {
  using S = GemmSm90<F, Tokens>;
  const GemmSm90Walk walk = gemm_sm90_walk<S, F>(p, cluster, stored_bits<F>(p.w), limits.multiprocessors);
  // Each block of a pair brings half of the rows. Alone, it reads no more rows than there are.
  const int x_rows = cluster == 2 ? Tokens / 2 : static_cast<int>(std::min<int64_t>(p.batch * p.m, Tokens));
  CUtensorMap x_map;
  if (const char* problem = encode_rows(&x_map, p.x, p.x_type, p.batch * p.m, p.k, x_rows)) return problem;
  if (const cudaError_t error = allow_shared<gemm_sm90<F, T, Tokens>>(S::kShared, limits); error != cudaSuccess) {
    return cudaGetErrorString(error);
  }
  const int clusters = std::min(walk.items, limits.multiprocessors / cluster);
  return launch(gemm_sm90<F, T, Tokens>, {clusters * cluster, 1, S::kThreads, S::kShared, cluster}, stream, p, walk,
                x_map, x_rows);
}

template <class F, class T>
const char* launch_gemm_sm90_type(const Product& p, const DeviceLimits& limits, cudaStream_t stream) {
  const GemmSm90Config config = choose_gemm_sm90(p, stored_bits<F>(p.w), limits.multiprocessors);
  const auto launch_tile = config.tokens == 64    ? launch_gemm_sm90_tile<F, T, 64>
                           : config.tokens == 128 ? launch_gemm_sm90_tile<F, T, 128>
                                                  : launch_gemm_sm90_tile<F, T, 256>;
  return launch_tile(p, config.cluster, limits, stream);
}

template <class F>
const char* launch_gemm_sm90(const Product& p, cudaStream_t stream) {
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(&limits); error != cudaSuccess) return cudaGetErrorString(error);
  if (const char* refusal = gemm_sm90_refusal<F>(p, limits)) return refusal;
  return p.x_type == Scalar::kF16 ? launch_gemm_sm90_type<F, MmaF16>(p, limits, stream)
                                  : launch_gemm_sm90_type<F, MmaBF16>(p, limits, stream);
}

}  // namespace jax_qgemm
