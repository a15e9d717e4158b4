// Decodes some rows of a weight to a dense matrix, for products so large that a dense one costs little.
//
// A warp decodes a tile (16 rows of n x 64 of k) into shared memory, in float32 and to the bit, and writes it in rows.
#pragma once

#include "formats/tile_codes.cuh"
#include "kernels/product.h"
#include "tile/lane_codes.cuh"
#include "tile/scalar.cuh"

namespace jax_qgemm {

constexpr int kDequantizeWarps = 8;

template <class F>
__global__ void __launch_bounds__(32 * kDequantizeWarps) dequantize(const DenseRows d) {
  constexpr int kStride = kTileK + 4;  // 16 bytes of padding, against bank conflicts
  __shared__ __align__(16) float tiles[kDequantizeWarps][kTileN][kStride];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t k_tiles = (d.k + kTileK - 1) / kTileK, stored_k_tiles = d.w.k_blocks * (k_block_of<F>(d.w) / kTileK);
  const int64_t tile_row = blockIdx.x / ((k_tiles + kDequantizeWarps - 1) / kDequantizeWarps);
  const int64_t k_tile = blockIdx.x % ((k_tiles + kDequantizeWarps - 1) / kDequantizeWarps) * kDequantizeWarps + warp;
  if (k_tile >= k_tiles) return;  // warps work alone: there is no barrier of the block
  float (&tile)[kTileN][kStride] = tiles[warp];

  for (int64_t batch = blockIdx.y; batch < d.batch; batch += gridDim.y) {
    const int64_t weight_row = d.stack.weight_of(batch) * d.tile_rows + d.first_tile_row + tile_row;
    LaneCodes<F> codes;
    codes.load(d.w, static_cast<uint64_t>(weight_row * stored_k_tiles + k_tile) * 32 + lane, lane);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const AffinePair affine = F::affine(d.w, weight_row, g, k_tile * 4 + step);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t levels = codes.levels(2 * step + h);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          tile[g + 8 * h][step * 16 + 2 * t + (e >> 1) + 8 * (e & 1)] =
              value_of<F>(affine.row[h], static_cast<int>(levels >> (8 * e) & 255));
        }
      }
    }
    __syncwarp();
    // Neighbouring lanes write neighbouring pairs of a row.
    const int64_t rows = d.rows - tile_row * kTileN < kTileN ? d.rows - tile_row * kTileN : kTileN;
    const int64_t k = k_tile * kTileK + 2 * lane;
    for (int row = 0; row < rows; ++row) {
      const int64_t at = (batch * d.rows + tile_row * kTileN + row) * d.k + k;
      const float2 pair = *reinterpret_cast<const float2*>(&tile[row][2 * lane]);
      if (k + 1 < d.k) {
        store_pair(d.out, at, d.out_type, pair);
      } else if (k < d.k) {
        store_scalar(d.out, at, d.out_type, pair.x);
      }
    }
    __syncwarp();
  }
}

}  // namespace jax_qgemm
