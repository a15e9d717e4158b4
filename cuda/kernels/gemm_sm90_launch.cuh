// From a Product to gemm_sm90.
#pragma once

#include <cmath>
#include <limits>

#include "kernels/gemm_sm90.cuh"
#include "kernels/gemm_sm90.h"
#include "kernels/gemm_sm90_config.cuh"

namespace jax_qgemm {

// Why the product cannot be computed, or nullptr.
template <class F>
const char* gemm_sm90_refusal(const Product& p, const DeviceLimits& limits) {
  constexpr int64_t kMax = std::numeric_limits<int>::max();
  if (limits.capability != 90) return "kernel gemm_sm90 needs a GPU of compute capability 9.0";
  if (p.x_type == Scalar::kF32) return "kernel gemm_sm90 does not serve float32 x";
  if (p.k % 8 != 0 || p.k == 0) return "kernel gemm_sm90 needs a k that is a multiple of 8";
  if (reinterpret_cast<uintptr_t>(p.x) % 16 != 0) return "kernel gemm_sm90 needs x aligned to 16 bytes";
  if (F::kGroup == 0 && (p.w.group == 16 || p.w.scale_type == ScaleType::kF32)) {
    return "kernel gemm_sm90 does not serve integer groups of 16 or float32 scales";
  }
  // The kernel counts rows of x, rows of tiles of w and columns of both in 32 bits.
  if (p.batch * p.m > kMax - 256 || p.stack.weights * p.tile_rows() > kMax - 32 || p.k > kMax - 256) {
    return "kernel gemm_sm90 does not serve this product: it is more than it can count";
  }
  return nullptr;
}

template <class F, class S>
GemmSm90Walk gemm_sm90_walk(const Product& p, const GemmSm90Shape& shape, const GemmSm90Split& split, int clusters) {
  GemmSm90Walk walk = {};
  walk.stages = static_cast<int>(divide_up(p.k, S::kTiles * kTileK));
  walk.row_blocks = static_cast<int>(split.row_blocks);
  walk.token_blocks = static_cast<int>(split.token_blocks);
  walk.pairs_per_batch = static_cast<int>(split.pairs_per_batch);
  walk.whole = static_cast<int>(split.whole);
  walk.items = static_cast<int>(split.items);
  walk.tile_rows = static_cast<int>(shape.tile_rows);
  // One turn of the grid reads `group` blocks of x and clusters / group pairs of blocks of rows: the sum is smallest
  // where both are equal.
  const double rows_bytes = clusters * 2 * S::kRows * shape.bits / 8, x_bytes = S::kTileBytes / kTileK;
  walk.group = std::clamp(static_cast<int>(std::lround(std::sqrt(rows_bytes / x_bytes))), 1, walk.token_blocks);
  walk.boxes = plane_boxes<F>(p.w, S::kRowTiles, S::kTiles);
  return walk;
}

// Describes x and the planes of w to the copy engine. Returns what went wrong, or nullptr.
template <class F, class S>
const char* encode_maps(ProductMaps* maps, const Product& p, const GemmSm90Walk& walk) {
  // Each thread block of a pair brings half of the rows.
  const char* problem = encode_rows(&maps->x, p.x, p.x_type, p.batch * p.m, p.k, S::kTileBytes / (kTileK * 2) / 2);
  return problem ? problem : encode_planes<F>(maps->planes, p, walk.boxes, S::kRowTiles);
}

template <class F, class T, int Tokens, int Blocks, int Span>
const char* launch_gemm_sm90_span(const Product& p, const GemmSm90Shape& shape, const DeviceLimits& limits,
                                  int clusters, cudaStream_t stream) {
  using S = GemmSm90<F, Tokens, Blocks, Span>;
  constexpr auto kKernel = gemm_sm90<F, T, Tokens, Blocks, Span>;
  const GemmSm90Split split(shape, {Tokens, Blocks}, clusters);
  const GemmSm90Walk walk = gemm_sm90_walk<F, S>(p, shape, split, clusters);
  ProductMaps maps;
  if (const char* problem = encode_maps<F, S>(&maps, p, walk)) return problem;
  if (const cudaError_t error = allow_shared<kKernel>(S::kShared, limits); error != cudaSuccess) {
    return cudaGetErrorString(error);
  }
  return launch(kKernel, {2 * std::min(walk.items, clusters), 1, S::kThreads, S::kShared, 2}, stream, p, walk, maps);
}

template <class F, class T, int Tokens, int Blocks>
const char* launch_gemm_sm90_tile(const Product& p, const GemmSm90Shape& shape, const DeviceLimits& limits,
                                  int clusters, cudaStream_t stream) {
  if constexpr (F::kGroup == 0) {
    return p.w.group == 32 ? launch_gemm_sm90_span<F, T, Tokens, Blocks, 2>(p, shape, limits, clusters, stream)
                           : launch_gemm_sm90_span<F, T, Tokens, Blocks, 4>(p, shape, limits, clusters, stream);
  } else {
    return launch_gemm_sm90_span<F, T, Tokens, Blocks, F::kGroup / 16>(p, shape, limits, clusters, stream);
  }
}

template <class F, class T>
const char* launch_gemm_sm90_type(const Product& p, const DeviceLimits& limits, cudaStream_t stream) {
  const GemmSm90Shape shape = {p.m, p.tile_rows(), p.k, p.batch, stored_bits<F>(p.w)};
  const int clusters = std::max(1, limits.multiprocessors / 2);
  const GemmSm90Config config = choose_gemm_sm90(shape, clusters);
  const auto launch_tile = config.blocks == 2     ? launch_gemm_sm90_tile<F, T, 128, 2>
                           : config.tokens == 64  ? launch_gemm_sm90_tile<F, T, 64, 1>
                           : config.tokens == 128 ? launch_gemm_sm90_tile<F, T, 128, 1>
                                                  : launch_gemm_sm90_tile<F, T, 256, 1>;
  return launch_tile(p, shape, limits, clusters, stream);
}

template <class F>
const char* launch_gemm_sm90(const Product& p, cudaStream_t stream, const char** refusal) {
  DeviceLimits limits;
  if (const cudaError_t error = device_limits(&limits); error != cudaSuccess) return cudaGetErrorString(error);
  *refusal = gemm_sm90_refusal<F>(p, limits);
  if (*refusal) return nullptr;
  return p.x_type == Scalar::kF16 ? launch_gemm_sm90_type<F, MmaF16>(p, limits, stream)
                                  : launch_gemm_sm90_type<F, MmaBF16>(p, limits, stream);
}

}  // namespace jax_qgemm
