// out = x @ w for up to 8 rows of x: the time to read the weights.
//
// A CTA holds x in shared memory and walks over blocks of rows of n; its warps split the rows and k. Every warp keeps
// the codes and the per-group values of the next two stages of k in registers, loaded as widely as the layout allows,
// and crosses from one block of rows to the next without a pause. Arithmetic as in gemm_sm80; a minimum's sum of x is
// taken once a CTA.
#pragma once

#include "formats/tile_codes.cuh"
#include "kernels/product.h"
#include "tile/group_registers.cuh"
#include "tile/lane_codes.cuh"
#include "tile/mma.cuh"
#include "tile/scalar.cuh"
#include "tile/stage_x.cuh"

namespace jax_qgemm {

constexpr int kGemvTokens = 8;
// Warps of a CTA: as many as leave a thread the registers for two stages of this format.
template <class F>
constexpr int kGemvMaxWarps = kStageOf<F> > 128 || F::kLowBits == 8 || F::kGroup == 0 ? 16 : 24;

struct GemvConfig {
  int row_tiles;   // of 16, a CTA
  int slices;      // of k, a CTA
  int row_blocks;  // of row_tiles, in all
  int terms;       // bf16 terms of x
  int resident;    // CTAs a multiprocessor; 0: no split fits

  QG_HD int threads() const { return 32 * row_tiles * slices; }
};

// How a CTA's shared memory is divided.
struct GemvShared {
  int stride;  // of a row of x, in elements: 16 bytes of padding keep ldmatrix free of bank conflicts
  int x_bytes, sums_bytes, partial_bytes;

  QG_HD GemvShared(int tokens, int stages, int stage_k, int group, bool has_minimum, const GemvConfig& c)
      : stride(stages * stage_k + 8),
        x_bytes(c.terms * tokens * stride * 2),
        sums_bytes(has_minimum ? stages * stage_k / group * kGemvTokens * 4 : 0),
        partial_bytes(2 * c.slices * c.row_tiles * 128 * 4) {}
  QG_HD int total() const { return x_bytes + sums_bytes + partial_bytes; }
};

template <class F>
QG_HD GemvShared gemv_shared(int tokens, int stages, const GemvConfig& c) {
  return GemvShared(tokens, stages, kStageOf<F>, F::kHasMinimum ? F::kGroup : 1, F::kHasMinimum, c);
}

template <class F>
struct LaneStage {
  LaneCodes<F> codes[kStageOf<F> / kTileK];
  GroupRegisters<F> groups;

  // row: of tiles of the weight; k_tiles: in one.
  __device__ __forceinline__ void load(const Weight& w, int row, int k_tiles, int stage, int lane) {
    constexpr int kTiles = kStageOf<F> / kTileK;
    const int tile = stage * kTiles;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (tile + i < k_tiles) codes[i].load(w, row * k_tiles + tile + i, lane);
    }
    groups.load(w, row, row * static_cast<int>(w.k_blocks), lane / 4, stage);
  }
};

template <class F, class T>
__global__ void __launch_bounds__(32 * kGemvMaxWarps<F>) gemv(const Product p, const GemvConfig c) {
  constexpr int kStage = kStageOf<F>, kSteps = kStage / 16;
  constexpr int kPerPair = F::kGroup == 16 ? 2 : 1;  // groups in two k-steps, the span of an ldmatrix
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, threads = c.threads();
  const int row_tile = warp % c.row_tiles, slice = warp / c.row_tiles;
  const int tokens = static_cast<int>(p.m), terms = T::kSplit ? c.terms : 1;
  const int stages = static_cast<int>((p.k + kStage - 1) / kStage);
  const int tile_rows = static_cast<int>(p.tile_rows());
  const int k_tiles = static_cast<int>(p.w.k_blocks * (k_block_of<F>(p.w) / kTileK));
  const int group = group_of<F>(p.w);
  const int group_steps = group == 0 || group > kStage ? kSteps : group == 16 ? 2 : group / 16;
  const int64_t batch = blockIdx.y;

  const GemvShared layout = gemv_shared<F>(tokens, stages, c);
  auto* shared = static_cast<char*>(ptx::dynamic_shared());
  auto* x = reinterpret_cast<uint16_t*>(shared);
  auto* partial = reinterpret_cast<float*>(shared + layout.x_bytes);
  auto* x_sums = reinterpret_cast<float*>(shared + layout.x_bytes + layout.partial_bytes);

  // This warp's work: stages slice, slice + slices, ... of one block of rows after another. `ahead` is what to load
  // next.
  struct Position {
    int block, row, stage;
  };
  const auto at_block = [&](int block) -> Position {
    const int row = block * c.row_tiles + row_tile;
    return {block, static_cast<int>(batch) * tile_rows + (row < tile_rows ? row : 0), slice};
  };
  Position ahead = at_block(blockIdx.x);
  LaneStage<F> now, next;
  const auto fetch = [&](LaneStage<F>& to) {
    if (ahead.block < c.row_blocks) to.load(p.w, ahead.row, k_tiles, ahead.stage, lane);
    ahead.stage += c.slices;
    if (ahead.stage >= stages) ahead = at_block(ahead.block + gridDim.x);
  };
  fetch(now);
  fetch(next);

  stage_rows<T>(x, layout.stride, tokens, stages * kStage, p.x, batch * p.m * p.k, p.k, p.x_type, terms, threads);
  __syncthreads();
  if constexpr (F::kHasMinimum) {
    constexpr int kGroup = F::kGroup;
    for (int i = threadIdx.x; i < stages * kStage / kGroup * tokens; i += threads) {
      const int token = i % tokens, first = i / tokens * kGroup;
      float sum = 0.0f;
      for (int term = 0; term < terms; ++term) {
        const uint16_t* row = x + (term * tokens + token) * layout.stride + first;
        for (int j = 0; j < kGroup; ++j) sum += operand_to_float<T>(row[j]);
      }
      x_sums[i / tokens * kGemvTokens + token] = sum;
    }
    __syncthreads();
  }

  // Rows of x beyond `tokens` are a copy of the last: they reach only sums that are never stored.
  const int x_row = lane % 8 < tokens ? lane % 8 : tokens - 1;
  const uint16_t* x_lane = x + x_row * layout.stride + lane / 8 * 8;
  int buffer = 0;
  for (int block = blockIdx.x; block < c.row_blocks; block += gridDim.x, buffer ^= 1) {
    float sums[4] = {};
    for (int stage = slice; stage < stages; stage += c.slices) {
      float group_sums[kPerPair][4];
      AffinePair affine[kPerPair];
#pragma unroll
      for (int step = 0; step < kSteps; step += 2) {
        if (step % group_steps == 0) {
#pragma unroll
          for (int i = 0; i < kPerPair; ++i) {
            affine[i] = now.groups.affine(p.w, step + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) group_sums[i][j] = 0.0f;
          }
        }
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const LaneCodes<F>& codes = now.codes[step / 4];
          const AffinePair& of = affine[i % kPerPair];
          const int run = (step % 4 + i) * 2;
          Converter<T::kIsBF16, wide_levels<F>()>(of.row[0].zero)(codes.levels(run), a[i][0], a[i][2]);
          Converter<T::kIsBF16, wide_levels<F>()>(of.row[1].zero)(codes.levels(run + 1), a[i][1], a[i][3]);
        }
        for (int term = 0; term < terms; ++term) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, x_lane + term * tokens * layout.stride + stage * kStage + step * 16);
          mma<T>(group_sums[0], a[0], b[0], b[1]);
          mma<T>(group_sums[kPerPair - 1], a[1], b[2], b[3]);
        }
        if ((step + 2) % group_steps == 0) {
#pragma unroll
          for (int i = 0; i < kPerPair; ++i) {
            const Affine &low = affine[i].row[0], &high = affine[i].row[1];
            sums[0] = fmaf(low.scale, group_sums[i][0], sums[0]);
            sums[1] = fmaf(low.scale, group_sums[i][1], sums[1]);
            sums[2] = fmaf(high.scale, group_sums[i][2], sums[2]);
            sums[3] = fmaf(high.scale, group_sums[i][3], sums[3]);
            if constexpr (F::kHasMinimum) {
              const int in_stage = step * 16 / F::kGroup + i;
              const float* of_group = x_sums + (stage * (kStage / F::kGroup) + in_stage) * kGemvTokens;
              const float2 total = *reinterpret_cast<const float2*>(of_group + lane % 4 * 2);
              sums[0] = fmaf(low.minimum, total.x, sums[0]);
              sums[1] = fmaf(low.minimum, total.y, sums[1]);
              sums[2] = fmaf(high.minimum, total.x, sums[2]);
              sums[3] = fmaf(high.minimum, total.y, sums[3]);
            }
          }
        }
      }
      now = next;
      fetch(next);
    }

    // The sum over the slices, in their order. Two buffers: one barrier a block of rows is enough.
    float* slot = partial + buffer * c.slices * c.row_tiles * 128;
    *reinterpret_cast<float4*>(slot + warp * 128 + lane * 4) = make_float4(sums[0], sums[1], sums[2], sums[3]);
    __syncthreads();
    for (int e = threadIdx.x; e < c.row_tiles * kTileN * tokens; e += threads) {
      const int row = e % kTileN, tile = e / kTileN % c.row_tiles, token = e / kTileN / c.row_tiles;
      const float* source = slot + tile * 128 + (row % 8 * 4 + token / 2) * 4 + row / 8 * 2 + token % 2;
      float sum = 0.0f;
      for (int i = 0; i < c.slices; ++i) sum += source[i * c.row_tiles * 128];
      const int n = (block * c.row_tiles + tile) * kTileN + row;
      if (n < p.n) store_scalar(p.out, (batch * p.m + token) * p.n + n, p.out_type, sum);
    }
  }
}

}  // namespace jax_qgemm
