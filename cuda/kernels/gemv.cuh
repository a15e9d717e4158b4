// out = x @ w for up to 8 rows of 16-bit x: the time to read the weights.
//
// A thread block, or two of them that split k, takes some rows of n at a time; its warps split those rows and k. What
// counts is that enough of the weights are under way, at all times. So every warp copies the codes and the per-group
// values of its next stages of k into a ring of its own in shared memory, and crosses from one block of rows to the
// next without a pause. (In registers they would wait for one another: a warp has six scoreboards, and ptxas gives all
// loads of a loop the same one.) x stays in shared memory too, and beside it the sums of x over each group: a zero
// point or a minimum costs little in the inner loop. As in gemm_sm80 the product is computed transposed, w being the A
// operand of mma.sync, and each group's sums are multiplied by its scale in float32.
#pragma once

#include "formats/tile_codes.cuh"
#include "kernels/product.h"
#include "tile/a_operand.cuh"
#include "tile/cluster_sum.cuh"
#include "tile/stage_copier.cuh"
#include "tile/store.cuh"
#include "tile/x_ring.cuh"

namespace jax_qgemm {

struct GemvConfig {
  int row_tiles;  // of 16, a thread block
  int slices;     // of k, a thread block
  int cluster;    // thread blocks that split k: 1 or 2

  QG_HD int threads() const { return 32 * row_tiles * slices; }
};

// Of a thread block: 80 registers a thread, or 96 for what comes in stages of 256.
template <class F>
constexpr int kGemvMaxWarps = kStageOf<F> > 128 ? 20 : 24;

// What follows from a product and a split of it. The host computes it, so that the kernel finds it all in constant
// memory.
struct GemvSizes {
  int tokens, tile_rows, row_blocks;  // row_blocks: of row_tiles each
  int k_tiles, k_blocks;              // of a row of tiles, as stored
  int stages, stages_per_block;       // in all; of a block of a cluster
  int steps;                          // of one stage a slice
  int chunk_bytes;                    // of x in shared memory: 64 elements of all rows
  int stage_bytes, ring_bytes;        // of a stage of the weights of a warp, of all under way
  // How shared memory is divided: barriers, x, sums of x, rings of the warps, two buffers of partial sums, what the
  // other block of a cluster sends.
  int x, x_sums, rings, partial, received, total;
  int inverse_tokens, inverse_tiles;  // i / tokens is i * inverse_tokens >> 20

  GemvSizes(int64_t m, int64_t tile_rows, int64_t k_blocks, int64_t k_block, int64_t k, int stage_k, int stage_bytes,
            int depth, int group_steps, const GemvConfig& c)
      : tokens(static_cast<int>(m)),
        tile_rows(static_cast<int>(tile_rows)),
        row_blocks((this->tile_rows + c.row_tiles - 1) / c.row_tiles),
        k_tiles(static_cast<int>(k_blocks * (k_block / kTileK))),
        k_blocks(static_cast<int>(k_blocks)),
        stages(static_cast<int>((k + stage_k - 1) / stage_k)),
        stages_per_block((stages + c.cluster - 1) / c.cluster),
        steps((stages_per_block + c.slices - 1) / c.slices),
        chunk_bytes(tokens * 128),
        stage_bytes(stage_bytes),
        ring_bytes(stage_bytes * depth),
        x(128),
        x_sums(x + stages_per_block * (stage_k / 64) * chunk_bytes),
        rings(x_sums + (stages_per_block * (stage_k / 16 / group_steps) * 32 + 127) / 128 * 128),
        partial(rings + c.slices * c.row_tiles * ring_bytes),
        received(partial + 2 * c.slices * c.row_tiles * 512),
        total(received + (c.cluster == 2 ? 2 * c.row_tiles * 8 * tokens * 4 : 0)),
        inverse_tokens(static_cast<int>(x_ring_inverse(tokens))),
        inverse_tiles(static_cast<int>(x_ring_inverse(c.row_tiles))) {}
};

// The sums of x over each group of a stage, of columns 2 * (lane % 4) and the next, in the units of the sums of rows g.
template <class F, class T, int GroupSteps>
__device__ __forceinline__ void sum_groups(float2* out, ptx::SharedAddress x, int chunk_bytes, int lane) {
  constexpr uint32_t kOnes[4] = {T::kOne, T::kOne, T::kOne, T::kOne};
  constexpr float kUnit = 1.0f / AOperand<F, T, false>::kUnit;
  float sums[GroupSteps == 1 ? 2 : 1][4] = {};
#pragma unroll
  for (int step = 0; step < kStageOf<F> / 16; step += 2) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, (step % 4 ? ptx::toggle(x, 64) : x) + step / 4 * chunk_bytes);
    mma<T>(sums[0], kOnes, b[0], b[1]);
    mma<T>(sums[GroupSteps == 1], kOnes, b[2], b[3]);
    if ((step + 2) % GroupSteps != 0) continue;
#pragma unroll
    for (float (&of)[4] : sums) {
      if (lane < 4) *out = float2{of[0] * kUnit, of[1] * kUnit};
      out += 4;
      of[0] = of[1] = of[2] = of[3] = 0.0f;
    }
  }
}

// Adds the product of one stage to the sums, which are in the units of AOperand. x: the lane's address for ldmatrix in
// chunk 0 of the stage, for k-steps 0 and 1; x_sums: of the stage's first group. GroupSteps k-steps share a scale.
template <class F, class T, int GroupSteps>
__device__ __forceinline__ void multiply_few(float (&sums)[4], const Weight& weight, const LaneStage<F>& w,
                                             ptx::SharedAddress x, int chunk_bytes, const float2* x_sums) {
  using A = AOperand<F, T, false>;
  constexpr float kRatio = A::kUnit / A::kHighUnit;  // of the units of rows g + 8 to those of rows g
  constexpr int kChains = GroupSteps >= 4 ? 2 : 1;   // of dependent mmas
  constexpr int kSpan = 8;                           // k-steps whose x is loaded at once
#pragma unroll
  for (int first = 0; first < kStageOf<F> / 16; first += kSpan) {
    uint32_t b[kSpan / 2][4];
#pragma unroll
    for (int pair = 0; pair < kSpan / 2; ++pair) {
      ptx::ldmatrix_x4(b[pair], (pair % 2 ? ptx::toggle(x, 64) : x) + (first / 4 + pair / 2) * chunk_bytes);
    }
#pragma unroll
    for (int step = first; step < first + kSpan; step += GroupSteps) {
      const AffinePair affine = w.groups.template affine<GroupSteps>(weight, step);
      float group_sums[kChains][4] = {};
      float2 x_sum = {};
      if constexpr (F::kHasMinimum || !A::kExact) x_sum = x_sums[step / GroupSteps * 4];
      if constexpr (!F::kHasMinimum && !A::kExact) {
        // Begin at what the operands' having no zero point will add up to.
        const float low = -static_cast<float>(affine.row[0].zero + A::kBias);
        const float high = -kRatio * static_cast<float>(affine.row[1].zero + A::kBias);
        group_sums[0][0] = low * x_sum.x, group_sums[0][1] = low * x_sum.y;
        group_sums[0][2] = high * x_sum.x, group_sums[0][3] = high * x_sum.y;
      }
#pragma unroll
      for (int i = 0; i < GroupSteps; ++i) {
        const int at = step + i;
        uint32_t a[4];
        A::decode(a, w.codes[at / 4], at % 4, affine);
        const uint32_t* of = b[(at - first) / 2] + at % 2 * 2;
        mma<T>(group_sums[i % kChains], a, of[0], of[1]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Affine& row = affine.row[j / 2];
#pragma unroll
        for (int chain = 0; chain < kChains; ++chain) sums[j] = fmaf(row.scale, group_sums[chain][j], sums[j]);
        if constexpr (F::kHasMinimum) {
          sums[j] = fmaf((j < 2 ? 1.0f : kRatio) * A::minimum(row), j % 2 ? x_sum.y : x_sum.x, sums[j]);
        }
      }
    }
  }
}

template <class F, class T, class G>
__global__ void __launch_bounds__(32 * kGemvMaxWarps<F>) gemv(const Product p, const GemvConfig c, const GemvSizes s) {
  using A = AOperand<F, T, false>;
  constexpr int kStage = kStageOf<F>, kChunks = kStage / kTileK, kDepth = kCopyDepth<F>;
  const Weight weight = with_grouping<F, G>(p.w);
  // Opaque: the compiler would compute it, and what follows from it, again and again in the loop.
  const int lane = ptx::opaque(static_cast<int>(threadIdx.x) % 32);
  const int warp = threadIdx.x / 32, threads = c.threads();
  const int row_tile = warp % c.row_tiles, slice = warp / c.row_tiles;
  const int64_t batch = blockIdx.y;

  const int rank = c.cluster == 2 ? ptx::cluster_rank() : 0;
  const int first_block = blockIdx.x / c.cluster, block_stride = gridDim.x / c.cluster;
  const int first_stage = rank * s.stages_per_block;
  const int end_stage = rank == c.cluster - 1 ? s.stages : s.stages_per_block;

  auto* shared = static_cast<char*>(ptx::dynamic_shared());
  ClusterSum exchange = {reinterpret_cast<uint64_t*>(shared), reinterpret_cast<float*>(shared + s.received),
                         c.row_tiles * 8 * s.tokens, rank};
  if (c.cluster == 2) exchange.start();

  // Rows of x beyond `tokens` reach only sums that are never stored: the last row again.
  const int x_row = lane % 8 < s.tokens ? lane % 8 : s.tokens - 1;
  const ptx::SharedAddress x_lane = ptx::shared_address(shared + s.x) + x_row * 128 + ((lane / 8) ^ (x_row % 8)) * 16;

  const XRing<T> x = {
      p,
      batch * p.m * p.k,
      first_stage * kStage,
      shared + s.x,
      {s.tokens, s.tokens, s.stages_per_block * kChunks, 1, 1, 1, static_cast<uint32_t>(s.inverse_tokens)}};
  x.load_all();

  // This warp's work: stages first_stage + slice + i * slices of one block of rows after another. `ahead` is what to
  // copy next; a row of tiles that does not exist is the last that does.
  struct Position {
    int block, row, stage;
  };
  const bool has_stages = first_stage + slice < end_stage;
  Position ahead = {has_stages ? first_block : s.row_blocks, first_block * c.row_tiles + row_tile, first_stage + slice};
  StageCopier<F, G> copier(weight, batch * s.tile_rows + (ahead.row < s.tile_rows ? ahead.row : 0), s.k_tiles,
                           s.k_blocks, lane);
  char* const ring = shared + s.rings + warp * s.ring_bytes;
  // The stage of the ring that is copied to and read from. No other warp has anything to do with it.
  int slot = 0;
  const auto next_slot = [&] { slot = slot + s.stage_bytes == s.ring_bytes ? 0 : slot + s.stage_bytes; };
  const auto copy = [&]() __attribute__((always_inline)) {
    if (ahead.block < s.row_blocks) {
      copier.copy(ptx::shared_address(ring) + slot, ahead.stage, s.k_tiles, lane);
      ahead.stage += c.slices;
      if (ahead.stage >= end_stage) {
        const int rows = block_stride * c.row_tiles;
        ahead = {ahead.block + block_stride, ahead.row + rows, first_stage + slice};
        if (ahead.row < s.tile_rows) copier.advance(weight, rows, s.k_tiles, s.k_blocks);
      }
    }
    ptx::copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kDepth; ++i, next_slot()) copy();
  ptx::copy_async_wait<kDepth>();  // for x
  __syncthreads();

  const int block_stages = end_stage - first_stage;
  const int chunk_bytes = ptx::opaque(s.chunk_bytes);
  const auto x_of = [&](int stage) { return x_lane + stage * kChunks * chunk_bytes; };
  const auto x_sums_of = [&](int stage) {
    return reinterpret_cast<float2*>(shared + s.x_sums) + stage * (kStage / 16 / G::kSteps * 4) + lane % 4;
  };
  if constexpr (F::kHasMinimum || !A::kExact) {
#pragma unroll 1
    for (int stage = warp; stage < block_stages; stage += c.row_tiles * c.slices) {
      sum_groups<F, T, G::kSteps>(x_sums_of(stage), x_of(stage), chunk_bytes, lane);
    }
    __syncthreads();
  }
  if (c.cluster == 2) ptx::cluster_wait();

  int buffer = 0;
#pragma unroll 1
  for (int block = first_block; block < s.row_blocks; block += block_stride) {
    float sums[4] = {};
#pragma unroll 1
    for (int stage = slice; stage < block_stages; stage += c.slices, next_slot()) {
      ptx::copy_async_wait<kDepth - 1>();
      LaneStage<F> w;
      w.template load<G::kSteps>(weight, {}, 0, 0, 0, lane, FromShared{ring + slot, lane});
      copy();
      multiply_few<F, T, G::kSteps>(sums, weight, w, x_of(stage), chunk_bytes, x_sums_of(stage));
    }

    // The sum over the slices, in their order, then over the two blocks of a cluster: each has eight of sixteen rows.
    float* partial = reinterpret_cast<float*>(shared + s.partial) + buffer * c.slices * c.row_tiles * 128;
    *reinterpret_cast<float4*>(partial + warp * 128 + lane * 4) =
        make_float4(sums[0] * A::kUnit, sums[1] * A::kUnit, sums[2] * A::kHighUnit, sums[3] * A::kHighUnit);
    __syncthreads();
    const auto sum_of = [&](int tile, int row, int token) {
      const float* source = partial + tile * 128 + (row % 8 * 4 + token / 2) * 4 + row / 8 * 2 + token % 2;
      float sum = 0.0f;
#pragma unroll 4
      for (int i = 0; i < c.slices; ++i) sum += source[i * c.row_tiles * 128];
      return sum;
    };
    if (c.cluster == 2) {
      for (int e = threadIdx.x; e < exchange.cells; e += threads) {
        const int token = e / 8 * s.inverse_tiles >> 20, tile = e / 8 - token * c.row_tiles;
        exchange.send(e, sum_of(tile, e % 8 + (rank ^ 1) * 8, token));
      }
      exchange.wait();
    }
    const auto result = [&](int tile, int row, int token) {
      const float sum = sum_of(tile, row, token);
      return c.cluster == 2 ? sum + exchange.part_of_other((token * c.row_tiles + tile) * 8 + row % 8) : sum;
    };
    const int rows_log = c.cluster == 2 ? 3 : 4, gated = p.epilogue.gated;  // two tiles make one of a gated result
    const bool plain = p.epilogue.empty();                                  // asked once, not for each result
    for (int e = threadIdx.x; e < (c.row_tiles << rows_log >> gated) * s.tokens; e += threads) {
      const int row = (e & ((1 << rows_log) - 1)) + rank * 8, i = e >> rows_log;
      const int token = i * (s.inverse_tiles << gated) >> 20, tile = (i << gated) - token * c.row_tiles;
      const int64_t n = (static_cast<int64_t>(block) * c.row_tiles + tile) * kTileN + row;
      if (n >= p.n) continue;
      if (plain) {
        store_scalar(p.out, (batch * p.m + token) * p.n + n, p.out_type, result(tile, row, token));
      } else {
        store_result(p, batch, token, n, result(tile, row, token), gated ? result(tile + 1, row, token) : 0.0f);
      }
    }
    if (c.cluster == 2) exchange.finish_round();
    buffer ^= 1;  // so one barrier a block of rows is enough
  }
}

}  // namespace jax_qgemm
