// out = x @ w^T, the derivative with respect to x: float32 arithmetic on weights decoded to the bit.
//
// The contraction runs over n, along which the scales vary, so they can't be applied to sums. A CTA decodes one tile of
// 16 (n) x 64 (k) at a time into shared memory and multiplies it by 64 rows of x; sums of a tile are added to the
// totals.
#pragma once

#include "formats/tile_codes.cuh"
#include "kernels/product.h"
#include "tile/scalar.cuh"

namespace jax_qgemm {

constexpr int kTransposedTokens = 64;
constexpr int kTransposedThreads = 256;  // one run of a tile each

template <class F>
__global__ void __launch_bounds__(kTransposedThreads) gemm_transposed(const Product p, int k_tiles) {
  constexpr int kRows = 4, kColumns = 4;  // of the result, a thread
  __shared__ __align__(16) float weights[kTileN][kTileK];
  __shared__ __align__(16) float rows[kTileN][kTransposedTokens];

  const int64_t token0 = blockIdx.x / k_tiles * static_cast<int64_t>(kTransposedTokens);
  const int k_tile = static_cast<int>(blockIdx.x % k_tiles);
  const int64_t stored_k_tiles = p.w.k_blocks * (k_block_of<F>(p.w) / kTileK);
  const int lane = threadIdx.x % 32, run = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4, step = run / 2, h = run % 2;
  const int column0 = threadIdx.x % 16 * kColumns, row0 = threadIdx.x / 16 * kRows;

  for (int64_t batch = blockIdx.y; batch < p.batch; batch += gridDim.y) {
    float totals[kRows][kColumns] = {};
    const int64_t first_row = p.stack.weight_of(batch) * p.tile_rows();
    for (int64_t tile_row = 0; tile_row < p.tile_rows(); ++tile_row) {
      const int64_t weight_row = first_row + tile_row;
      const Affine affine = F::affine(p.w, weight_row, g, k_tile * 4 + step).row[h];
      const uint32_t levels = F::levels(run_codes<F>(p.w, weight_row * stored_k_tiles + k_tile, lane, run));
      const int column = step * 16 + 2 * t;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        weights[g + 8 * h][column + (e >> 1) + 8 * (e & 1)] =
            value_of<F>(affine, static_cast<int>(levels >> (8 * e) & 255));
      }
      for (int i = threadIdx.x; i < kTileN * kTransposedTokens; i += kTransposedThreads) {
        const int n_local = i % kTileN, token = i / kTileN;
        const int64_t n = tile_row * kTileN + n_local;
        const bool inside = n < p.n && token0 + token < p.m;
        rows[n_local][token] = inside ? load_scalar(p.x, (batch * p.m + token0 + token) * p.n + n, p.x_type) : 0.0f;
      }
      __syncthreads();
      float sums[kRows][kColumns] = {};
#pragma unroll
      for (int n = 0; n < kTileN; ++n) {
        const float4 w = *reinterpret_cast<const float4*>(&weights[n][column0]);
        const float4 x = *reinterpret_cast<const float4*>(&rows[n][row0]);
        const float ws[kColumns] = {w.x, w.y, w.z, w.w}, xs[kRows] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) sums[i][j] = fmaf(xs[i], ws[j], sums[i][j]);
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) totals[i][j] += sums[i][j];
      }
      __syncthreads();
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kColumns; ++j) {
        const int64_t token = token0 + row0 + i, k = static_cast<int64_t>(k_tile) * kTileK + column0 + j;
        if (token < p.m && k < p.k) store_scalar(p.out, (batch * p.m + token) * p.k + k, p.out_type, totals[i][j]);
      }
    }
  }
}

}  // namespace jax_qgemm
