// out = x @ w by mma.sync, for every format and every m, n, k.
//
// The product is computed transposed: 16 rows of n are the M of an mma, 8 rows of x its N. A weight tile (16 x 64) is
// one aligned load a lane and becomes the A operand in registers as exact integers, level - zero. Each group's partial
// sums are multiplied by its scale in float32; a minimum multiplies the sum of x, which an mma with ones provides. A
// CTA's warps split n and k; the split along k is reduced in shared memory, in a fixed order.
//
// float32 x is split into two bf16 terms (16 significant bits, better than TF32), or three (all 24) for `highest`; the
// integers being exact in bf16, so is every product. Tensor cores cut off sums toward zero, and an error of one sign
// grows with every mma of a chain: so a chain has only the terms of one k-step, the smallest first, and float32
// additions, which round to nearest, do the rest, tile by tile.
#pragma once

#include "formats/tile_codes.cuh"
#include "kernels/product.h"
#include "tile/a_operand.cuh"
#include "tile/stage_x.cuh"
#include "tile/store.cuh"

namespace jax_qgemm {

struct GemmSm80 {
  static constexpr int kTokenTiles = 4;  // of 8 rows of x, a CTA
  static constexpr int kWarpsN = 4;      // row tiles a CTA
  static constexpr int kWarpsK = 2;      // tiles of k a stage
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kThreads = 32 * kWarpsN * kWarpsK;
  static constexpr int kStageK = kTileK * kWarpsK;
  static constexpr int kRowStride = kStageK + 8;  // 16 bytes of padding keep ldmatrix free of bank conflicts
  static constexpr int kMaxTerms = 3;
  static constexpr int kPartials = kTokenTiles * 128;  // float32 sums of a warp

  union Shared {
    uint16_t x[kMaxTerms][kTokens][kRowStride];
    float partial[kWarpsK][kWarpsN][kPartials];
  };
};

template <class F, class T>
__global__ void __launch_bounds__(GemmSm80::kThreads) gemm_sm80(const Product p, int row_groups, int split_terms) {
  using S = GemmSm80;
  using A = AOperand<F, T, true>;
  constexpr int kTokenTiles = S::kTokenTiles;
  __shared__ __align__(16) S::Shared shared;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const int warp_n = warp % S::kWarpsN, warp_k = warp / S::kWarpsN;
  const int64_t token0 = blockIdx.x / row_groups * static_cast<int64_t>(S::kTokens);
  const int tokens = static_cast<int>(p.m - token0 < S::kTokens ? p.m - token0 : S::kTokens);
  const int terms = T::kSplit ? split_terms : 1;
  const int64_t tile_rows = p.tile_rows();
  const int64_t row_tile = blockIdx.x % row_groups * static_cast<int64_t>(S::kWarpsN) + warp_n;
  const bool has_rows = row_tile < tile_rows;
  const int64_t k_tiles = (p.k + kTileK - 1) / kTileK;                          // that x reaches
  const int64_t stored_k_tiles = p.w.k_blocks * (k_block_of<F>(p.w) / kTileK);  // that the planes hold
  const int group = group_of<F>(p.w);
  const int group_steps = group == 0 || group >= kTileK ? 4 : group / 16;

  for (int64_t batch = blockIdx.y; batch < p.batch; batch += gridDim.y) {
    const int64_t weight_row = p.stack.weight_of(batch) * tile_rows + (has_rows ? row_tile : 0);
    const int64_t x_base = (batch * p.m + token0) * p.k;
    float sums[kTokenTiles][4] = {};

    const auto lane_of_tile = [&](int64_t k_tile) {
      return static_cast<uint64_t>(weight_row * stored_k_tiles + k_tile) * 32 + lane;
    };
    LaneCodes<F> codes;
    if (warp_k < k_tiles) codes.load(p.w, lane_of_tile(warp_k), lane);
    for (int64_t stage_tile = 0; stage_tile < k_tiles; stage_tile += S::kWarpsK) {
      // Rows of the stage beyond `tokens` stay unwritten: they reach only sums that are never stored.
      for (int i = threadIdx.x; i < tokens * S::kStageK; i += S::kThreads) {
        const int token = i / S::kStageK, column = i % S::kStageK;
        const int64_t k = stage_tile * kTileK + column;
        const float value = k < p.k ? load_scalar(p.x, x_base + token * p.k + k, p.x_type) : 0.0f;
        stage_scalar<T>(&shared.x[0][token][column], S::kTokens * S::kRowStride, value, terms);
      }
      __syncthreads();

      const int64_t tile = stage_tile + warp_k;
      LaneCodes<F> next = codes;
      if (tile + S::kWarpsK < k_tiles) {
        next.load(p.w, lane_of_tile(tile + S::kWarpsK), lane);
      }
      if (tile < k_tiles) {
        AffinePair affine;
        float tile_sums[kTokenTiles][4] = {}, chain_sums[kTokenTiles][4], x_sums[kTokenTiles][4];
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          if (step % group_steps == 0) affine = F::affine(p.w, weight_row, g, tile * 4 + step);
          if (T::kSplit || step % group_steps == 0) {
#pragma unroll
            for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
              for (int j = 0; j < 4; ++j) chain_sums[i][j] = x_sums[i][j] = 0.0f;
            }
          }
          uint32_t a[4];
          A::decode(a, codes, step, affine);
          uint32_t ones[4];
          A::ones(ones);
          for (int term = terms - 1; term >= 0; --term) {
#pragma unroll
            for (int i = 0; i < kTokenTiles; i += 2) {
              // One ldmatrix gives the two halves of this k-step for two token tiles.
              const int matrix = lane / 8, tile_of_matrix = i + matrix / 2;
              uint32_t b[4];
              const uint16_t* row = shared.x[term][tile_of_matrix * 8 + lane % 8];
              ptx::ldmatrix_x4(b, ptx::shared_address(row + warp_k * kTileK + step * 16 + matrix % 2 * 8));
              mma<T>(chain_sums[i], a, b[0], b[1]);
              if constexpr (F::kHasMinimum) mma<T>(x_sums[i], ones, b[0], b[1]);
              mma<T>(chain_sums[i + 1], a, b[2], b[3]);
              if constexpr (F::kHasMinimum) mma<T>(x_sums[i + 1], ones, b[2], b[3]);
            }
          }
          if (T::kSplit || (step + 1) % group_steps == 0) {
            auto& to = T::kSplit ? tile_sums : sums;
#pragma unroll
            for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const Affine& row = affine.row[j / 2];
                to[i][j] = fmaf(row.scale, chain_sums[i][j], to[i][j]);
                if constexpr (F::kHasMinimum) to[i][j] = fmaf(row.minimum, x_sums[i][j], to[i][j]);
              }
            }
          }
        }
        if constexpr (T::kSplit) {
#pragma unroll
          for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i][j] += tile_sums[i][j];
          }
        }
      }
      codes = next;
      __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) shared.partial[warp_k][warp_n][(i * 32 + lane) * 4 + j] = sums[i][j] * A::kUnit;
    }
    __syncthreads();
    const auto sum_of = [&](int tile, int row, int token) {
      const int source = ((token / 8 * 32) + (row % 8) * 4 + token % 8 / 2) * 4 + row / 8 * 2 + token % 2;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < S::kWarpsK; ++i) sum += shared.partial[i][tile][source];
      return sum;
    };
    const int tiles = p.epilogue.gated ? 2 : 1;  // that make one of the result
    for (int e = threadIdx.x; e < S::kWarpsN / tiles * S::kPartials; e += S::kThreads) {
      // Rows of n fastest, so that neighbouring threads write neighbouring elements.
      const int row = e % kTileN, token = e / kTileN % S::kTokens, tile = e / kTileN / S::kTokens * tiles;
      const int64_t n = (blockIdx.x % row_groups * static_cast<int64_t>(S::kWarpsN) + tile) * kTileN + row;
      if (n < p.n && token < tokens) {
        store_result(p, batch, token0 + token, n, sum_of(tile, row, token),
                     tiles == 2 ? sum_of(tile + 1, row, token) : 0.0f);
      }
    }
    __syncthreads();
  }
}

}  // namespace jax_qgemm
