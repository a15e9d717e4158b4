// out = x @ w by mma.sync for up to 64 rows of x: gemv for what that does not serve, more rows of x, x in float32, and
// x that does not fit into shared memory.
//
// The operands of the mma are exact integers, level - zero. A warp keeps two stages of k in registers. x passes through
// a ring in shared memory, and stays there if it fits.
#pragma once

#include "formats/tile_codes.cuh"
#include "kernels/product.h"
#include "tile/a_operand.cuh"
#include "tile/cluster_sum.cuh"
#include "tile/lane_stage.cuh"
#include "tile/store.cuh"
#include "tile/x_ring.cuh"

namespace jax_qgemm {

struct GemvTilesConfig {
  int row_tiles;  // of 16, a thread block
  int slices;     // of k, a thread block
  int cluster;    // thread blocks that split k: 1 or 2
  int slots;      // of the ring of x
  int terms;      // bf16 terms of x

  QG_HD int threads() const { return 32 * row_tiles * slices; }
};

// Warps of a thread block: as many as leave a thread the registers for two stages of this format and the sums.
template <class F, int TokenTiles>
constexpr int kGemvTilesMaxWarps = TokenTiles == 8 ? 12 : 16;

// What follows from a product and a split of it. The host computes it, so that the kernel finds it all in constant
// memory.
struct GemvTilesSizes {
  int tokens, tile_rows, row_blocks;    // row_blocks: of row_tiles each
  int k_tiles, k_blocks;                // of a row of tiles, as stored
  int stages, stages_per_block;         // in all; of a block of a cluster
  int steps, even_steps;                // of one stage a slice; rounded up
  int x_rows, chunk_bytes, slot_bytes;  // of x in shared memory: rows, 64 elements of all rows, one step
  // How shared memory is divided: barriers, the ring of x, two (for few rows) or one buffer of partial sums, what the
  // other block of a cluster sends.
  int x, partial, received, total;
  uint32_t inverse_tokens;

  GemvTilesSizes(int64_t m, int64_t tile_rows, int64_t k_blocks, int64_t k_block, int64_t k, int stage_k,
                 int token_tiles, const GemvTilesConfig& c)
      : tokens(static_cast<int>(m)),
        tile_rows(static_cast<int>(tile_rows)),
        row_blocks((this->tile_rows + c.row_tiles - 1) / c.row_tiles),
        k_tiles(static_cast<int>(k_blocks * (k_block / kTileK))),
        k_blocks(static_cast<int>(k_blocks)),
        stages(static_cast<int>((k + stage_k - 1) / stage_k)),
        stages_per_block((stages + c.cluster - 1) / c.cluster),
        steps((stages_per_block + c.slices - 1) / c.slices),
        even_steps((steps + 1) / 2 * 2),
        x_rows(token_tiles == 1 ? tokens : 8 * token_tiles),
        chunk_bytes(x_rows * 128),
        slot_bytes(c.terms * c.slices * (stage_k / 64) * chunk_bytes),
        x(128),
        partial(x + (c.slots < steps ? c.slots : steps) * slot_bytes),
        received(partial + (token_tiles == 1 ? 2 : 1) * c.slices * c.row_tiles * token_tiles * 512),
        total(received + (c.cluster == 2 ? 2 * c.row_tiles * 8 * tokens * 4 : 0)),
        inverse_tokens(x_ring_inverse(tokens)) {}
};

// Adds the product of one stage to the sums, which are in the units of AOperand. x: the lane's address for ldmatrix in
// chunk 0 of the stage, for k-steps 0 and 1. GroupSteps k-steps share a scale; 0: as many as the group size says, two
// or more, and the sums are scaled after every two.
template <class F, class T, int TokenTiles, int GroupSteps>
__device__ __forceinline__ void multiply_stage(float (&sums)[TokenTiles][4], const Weight& weight,
                                               const LaneStage<F>& w, ptx::SharedAddress x, int chunk_bytes,
                                               int term_bytes, int terms) {
  using A = AOperand<F, T, true>;
  constexpr int kSteps = kStageOf<F> / 16;
  // Tensor cores truncate, so chains of mmas are as short as possible where x is float32: one k-step.
  constexpr int kSumSteps = T::kSplit ? 1 : GroupSteps == 0 ? 2 : GroupSteps;
  constexpr int kPerPair = kSumSteps == 1 ? 2 : 1;  // sums in two k-steps, the span of an ldmatrix
  AffinePair affine[kPerPair];
  uint32_t ones[4];
  A::ones(ones);
  float group_sums[TokenTiles][kPerPair][4], x_sums[TokenTiles][kPerPair][4];
#pragma unroll
  for (int step = 0; step < kSteps; step += 2) {
    const bool is_first = step % kSumSteps == 0, is_last = (step + 2) % kSumSteps == 0 || kSumSteps == 1;
    if (is_first) {
#pragma unroll
      for (int i = 0; i < kPerPair; ++i) {
        if constexpr (GroupSteps == 0) {
          affine[i] = w.groups.affine_of_any(weight, step);
        } else {
          affine[i] = w.groups.template affine<GroupSteps>(weight, step + i);
        }
      }
    }
    uint32_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) A::decode(a[i], w.codes[step / 4], (step + i) % 4, affine[i % kPerPair]);
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
      if (is_first) {
#pragma unroll
        for (int i = 0; i < kPerPair; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) group_sums[tile][i][j] = x_sums[tile][i][j] = 0.0f;
        }
      }
      for (int term = (T::kSplit ? terms : 1) - 1; term >= 0; --term) {  // the smallest first
        uint32_t b[4];
        ptx::ldmatrix_x4(
            b, (step % 4 ? ptx::toggle(x, 64) : x) + (step / 4 * chunk_bytes + tile * 1024 + term * term_bytes));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma<T>(group_sums[tile][i % kPerPair], a[i], b[2 * i], b[2 * i + 1]);
          if constexpr (F::kHasMinimum) mma<T>(x_sums[tile][i % kPerPair], ones, b[2 * i], b[2 * i + 1]);
        }
      }
      if (is_last) {
#pragma unroll
        for (int i = 0; i < kPerPair; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const Affine& row = affine[i].row[j / 2];
            sums[tile][j] = fmaf(row.scale, group_sums[tile][i][j], sums[tile][j]);
            if constexpr (F::kHasMinimum) sums[tile][j] = fmaf(row.minimum, x_sums[tile][i][j], sums[tile][j]);
          }
        }
      }
    }
  }
}

template <class F, class T, int TokenTiles>
__global__ void __launch_bounds__(32 * kGemvTilesMaxWarps<F, TokenTiles>)
    gemv_tiles(const Product p, const GemvTilesConfig c, const GemvTilesSizes s) {
  using A = AOperand<F, T, true>;
  constexpr int kStage = kStageOf<F>, kChunks = kStage / kTileK;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, threads = c.threads();
  const int row_tile = warp % c.row_tiles, slice = warp / c.row_tiles;
  const int terms = T::kSplit ? c.terms : 1;
  const int64_t batch = blockIdx.y;

  const int rank = c.cluster == 2 ? ptx::cluster_rank() : 0;
  const int first_block = blockIdx.x / c.cluster, block_stride = gridDim.x / c.cluster;
  const int first_stage = rank * s.stages_per_block;
  const int end_stage = rank == c.cluster - 1 ? s.stages : s.stages_per_block;

  auto* shared = static_cast<char*>(ptx::dynamic_shared());
  auto* partial = reinterpret_cast<float*>(shared + s.partial);
  ClusterSum exchange = {reinterpret_cast<uint64_t*>(shared), reinterpret_cast<float*>(shared + s.received),
                         c.row_tiles * 8 * s.tokens, rank};
  if (c.cluster == 2) exchange.start();

  // This warp's work: stages first_stage + slice + i * slices of one block of rows after another, i counted to an even
  // number so that a stage is always in the same one of the two sets of registers. `ahead` is what to load next.
  struct Position {
    int block, step;
    LaneRow<F> row;
  };
  const int first_row = static_cast<int>(p.stack.weight_of(batch)) * s.tile_rows;  // of the weight
  const auto at_block = [&](int block) -> Position {
    const int in_weight = block * c.row_tiles + row_tile;
    const int row = first_row + (in_weight < s.tile_rows ? in_weight : 0);
    return {block, 0, LaneRow<F>(p.w, row, s.k_tiles, s.k_blocks, lane)};
  };
  Position ahead = at_block(first_block);
  LaneStage<F> ring[2];
  const auto fetch = [&](LaneStage<F>& to, auto group_steps) __attribute__((always_inline)) {
    const int stage = first_stage + slice + ahead.step * c.slices;
    if (ahead.block < s.row_blocks && stage < end_stage) {
      to.template load<decltype(group_steps)::value>(p.w, ahead.row, s.k_tiles, s.k_blocks, stage, lane);
    }
    if (++ahead.step == s.even_steps) ahead = at_block(ahead.block + block_stride);
  };
  fetch(ring[0], std::integral_constant<int, 0>());
  fetch(ring[1], std::integral_constant<int, 0>());

  XRing<T> x = {p,
                batch * p.m * p.k,
                first_stage * kStage,
                shared + s.x,
                {s.tokens, s.x_rows, c.slices * kChunks, terms, s.steps, c.slots, s.inverse_tokens}};
  x.start((s.row_blocks - first_block + block_stride - 1) / block_stride, s.slot_bytes);

  // Rows of x beyond `tokens` reach only sums that are never stored: the last row again, or what the ring holds.
  const int x_row = TokenTiles > 1 || lane % 8 < s.tokens ? lane % 8 : s.tokens - 1;
  const int term_bytes = c.slices * kChunks * s.chunk_bytes;
  const int x_offset = slice * kChunks * s.chunk_bytes + x_row * 128;
  const int x_lane = x_offset + ((lane / 8) ^ (x_row % 8)) * 16;

  if (c.cluster == 2) ptx::cluster_wait();
  constexpr int kBuffers = TokenTiles == 1 ? 2 : 1;
  int buffer = 0;
  for (int block = first_block; block < s.row_blocks; block += block_stride) {
    float sums[TokenTiles][4] = {};
    // All of k. The group size is a constant of the loop, not a question in it.
    const auto multiply = [&](auto group_steps) __attribute__((always_inline)) {
      for (int step = 0; step < s.even_steps; step += 2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (x.to_read != 0 && step + half < s.steps) x.advance(step + half);
          if (first_stage + slice + (step + half) * c.slices < end_stage) {
            const ptx::SharedAddress at = x.slot(s.slot_bytes) + x_lane;
            multiply_stage<F, T, TokenTiles, decltype(group_steps)::value>(sums, p.w, ring[half], at, s.chunk_bytes,
                                                                           term_bytes, terms);
          }
          if (step + half < s.steps) x.next();
          fetch(ring[half], group_steps);
        }
      }
    };
    if constexpr (F::kGroup != 0) {
      multiply(std::integral_constant<int, F::kGroup / 16>());
    } else if constexpr (TokenTiles == 8) {
      multiply(std::integral_constant<int, 0>());  // no registers for sums that outlive two k-steps
    } else if (p.w.group == 32) {
      multiply(std::integral_constant<int, 2>());
    } else if (p.w.group == 64) {
      multiply(std::integral_constant<int, 4>());
    } else {
      multiply(std::integral_constant<int, 8>());
    }

    // The sum over the slices, in their order, then over the two blocks of a cluster: each has eight of sixteen rows.
    float* slot = partial + buffer * c.slices * c.row_tiles * TokenTiles * 128;
#pragma unroll
    for (int tile = 0; tile < TokenTiles; ++tile) {
      *reinterpret_cast<float4*>(slot + (warp * TokenTiles + tile) * 128 + lane * 4) =
          make_float4(sums[tile][0] * A::kUnit, sums[tile][1] * A::kUnit, sums[tile][2] * A::kHighUnit,
                      sums[tile][3] * A::kHighUnit);
    }
    __syncthreads();
    const auto sum_of = [&](int tile, int row, int token) {
      const float* source =
          slot + (tile * TokenTiles + token / 8) * 128 + (row % 8 * 4 + token % 8 / 2) * 4 + row / 8 * 2 + token % 2;
      float sum = 0.0f;
#pragma unroll 4
      for (int i = 0; i < c.slices; ++i) sum += source[i * c.row_tiles * TokenTiles * 128];
      return sum;
    };
    const int rows = kTileN / c.cluster;
    if (c.cluster == 2) {
      for (int e = threadIdx.x; e < exchange.cells; e += threads) {
        exchange.send(e, sum_of(e / 8 % c.row_tiles, e % 8 + (rank ^ 1) * 8, e / 8 / c.row_tiles));
      }
      exchange.wait();
    }
    const auto result = [&](int tile, int row, int token) {
      const float sum = sum_of(tile, row, token);
      return c.cluster == 2 ? sum + exchange.part_of_other((token * c.row_tiles + tile) * 8 + row % 8) : sum;
    };
    const int tiles = p.epilogue.gated ? 2 : 1;  // that make one of the result
    for (int e = threadIdx.x; e < c.row_tiles / tiles * rows * s.tokens; e += threads) {
      const int row = e % rows + rank * 8, tile = e / rows % (c.row_tiles / tiles) * tiles;
      const int token = e / rows / (c.row_tiles / tiles);
      const int64_t n = (static_cast<int64_t>(block) * c.row_tiles + tile) * kTileN + row;
      if (n < p.n) {
        store_result(p, batch, token, n, result(tile, row, token), tiles == 2 ? result(tile + 1, row, token) : 0.0f);
      }
    }
    if (c.cluster == 2) exchange.finish_round();
    if constexpr (kBuffers == 2) {
      buffer ^= 1;  // so one barrier a block of rows is enough
    } else {
      __syncthreads();
    }
  }
}

}  // namespace jax_qgemm
