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
#include "tile/x_rows.cuh"

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
  int ring_bytes;                     // of the weights of a warp that are under way
  // How shared memory is divided: barriers, x, sums of x, rings of the warps, two buffers of partial sums, what the
  // other block of a cluster sends.
  int x, x_sums, rings, partial, received, total;
  int inverse_tiles;  // i / row_tiles is i * inverse_tiles >> 20

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
        ring_bytes(stage_bytes * depth),
        x(128),
        x_sums(x + tokens * x_row_bytes(stages_per_block * stage_k)),
        rings((x_sums + stages_per_block * (stage_k / 16 / group_steps) * 32 + 127) / 128 * 128),
        partial(rings + c.slices * c.row_tiles * ring_bytes),
        received(partial + 2 * c.slices * c.row_tiles * 512),
        total(received + (c.cluster == 2 ? 2 * c.row_tiles * 8 * tokens * 4 : 0)),
        inverse_tiles(static_cast<int>(x_ring_inverse(c.row_tiles))) {}
};

// What the sums of x are kept multiplied by, in the units of the sums of rows g: what the operands' having no zero
// point adds up to, where all groups have the same.
template <class F, class T, class G>
constexpr float kXSumFactor = (F::kHasMinimum   ? 1.0f
                               : G::kZeroPoints ? -1.0f
                                                : -static_cast<float>(F::kZero + AOperand<F, T, false>::kBias)) /
                              AOperand<F, T, false>::kUnit;

// The lane's address for ldmatrix of k-steps `step` and the next, an even number, from that of the stage's first two.
__device__ __forceinline__ ptx::SharedAddress x_of_steps(ptx::SharedAddress x, int step) {
  return (step % 4 ? ptx::toggle(x, 64) : x) + step / 4 * 128;
}

// The sums of x over each group of a stage, of columns 2 * (lane % 4) and the next, times kXSumFactor.
template <class F, class T, class G>
__device__ __forceinline__ void sum_groups(float2* out, ptx::SharedAddress x, int lane) {
  constexpr uint32_t kOnes[4] = {T::kOne, T::kOne, T::kOne, T::kOne};
  constexpr float kFactor = kXSumFactor<F, T, G>;
  float2 sum = {};
#pragma unroll
  for (int step = 0; step < kStageOf<F> / 16; step += 2) {
    uint32_t b[4];
    ptx::ldmatrix_x4(b, x_of_steps(x, step));
    // Not one after the other: all warps wait for these sums before they begin.
    float sums[2][4] = {};
    mma<T>(sums[0], kOnes, b[0], b[1]);
    mma<T>(sums[G::kSteps == 1], kOnes, b[2], b[3]);
#pragma unroll
    for (int i = 0; i < (G::kSteps == 1 ? 2 : 1); ++i) {
      sum.x += sums[i][0], sum.y += sums[i][1];
      if (G::kSteps > 1 && (step + 2) % G::kSteps != 0) continue;
      if (lane < 4) out[(step + i) / G::kSteps * 4] = float2{sum.x * kFactor, sum.y * kFactor};
      sum = {};
    }
  }
}

__device__ __forceinline__ float2 load_sums(ptx::SharedAddress from) {
  uint32_t bits[2];
  ptx::load_shared<2>(bits, from);
  return {float_from_bits(bits[0]), float_from_bits(bits[1])};
}

// Adds the product of one stage to the sums, which are in the units of AOperand. x: the lane's address for ldmatrix of
// the stage's first two k-steps; x_sums: of its first group.
template <class F, class T, class G>
__device__ __forceinline__ void multiply_few(float (&sums)[4], const Weight& weight, const LaneStage<F>& w,
                                             ptx::SharedAddress x, ptx::SharedAddress x_sums) {
  using A = AOperand<F, T, false>;
  constexpr float kRatio = A::kUnit / A::kHighUnit;  // of the units of rows g + 8 to those of rows g
  constexpr int kChains = G::kSteps >= 4 ? 2 : 1;    // of dependent mmas
  constexpr int kSpan = 8;                           // k-steps whose x is loaded at once
#pragma unroll
  for (int first = 0; first < kStageOf<F> / 16; first += kSpan) {
    uint32_t b[kSpan / 2][4];
#pragma unroll
    for (int pair = 0; pair < kSpan / 2; ++pair) ptx::ldmatrix_x4(b[pair], x_of_steps(x, first + 2 * pair));
#pragma unroll
    for (int step = first; step < first + kSpan; step += G::kSteps) {
      const AffinePair affine = w.groups.template affine<G::kSteps>(weight, step);
      float group_sums[kChains][4] = {};
      float2 x_sum = {};
      if constexpr (F::kHasMinimum || !A::kExact) x_sum = load_sums(x_sums + step / G::kSteps * 32);
      if constexpr (!F::kHasMinimum && !A::kExact) {
        float2 low = x_sum, high = x_sum;
        if constexpr (G::kZeroPoints) {
          const auto zero_low = static_cast<float>(affine.row[0].zero + A::kBias);
          const auto zero_high = static_cast<float>(affine.row[1].zero + A::kBias);
          low = {zero_low * x_sum.x, zero_low * x_sum.y}, high = {zero_high * x_sum.x, zero_high * x_sum.y};
        }
        group_sums[0][0] = low.x, group_sums[0][1] = low.y;
        group_sums[0][2] = kRatio * high.x, group_sums[0][3] = kRatio * high.y;
      }
#pragma unroll
      for (int i = 0; i < G::kSteps; ++i) {
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
  using Copier = StageCopier<F, G>;
  constexpr int kStage = kStageOf<F>, kDepth = kCopyDepth<F>;
  const Weight weight = with_grouping<F, G>(p.w);
  // Opaque: the compiler would compute it, and what follows from it, again and again in the loop.
  const int lane = ptx::opaque(static_cast<int>(threadIdx.x % 32));
  const int warp = static_cast<int>(threadIdx.x / 32), threads = c.threads();
  const int slice = warp * s.inverse_tiles >> 20, row_tile = warp - slice * c.row_tiles;
  const int64_t batch = blockIdx.y;

  // A division by a run-time number takes its time.
  const int rank = c.cluster == 2 ? ptx::cluster_rank() : 0, cluster_log = c.cluster - 1;
  const auto first_block = static_cast<int>(blockIdx.x >> cluster_log);
  const auto block_stride = static_cast<int>(gridDim.x >> cluster_log);
  const int first_stage = rank * s.stages_per_block;
  const int end_stage = rank == c.cluster - 1 ? s.stages : s.stages_per_block;

  auto* shared = static_cast<char*>(ptx::dynamic_shared());
  ClusterSum exchange = {reinterpret_cast<uint64_t*>(shared), reinterpret_cast<float*>(shared + s.received),
                         c.row_tiles * 8 * s.tokens, rank};
  if (c.cluster == 2) exchange.start();

  const int x_stride = static_cast<int>(p.k);  // elements of x, of one entry of the batch, are counted in 32 bits
  load_x_rows(static_cast<const uint16_t*>(p.x) + batch * (s.tokens * x_stride), s.tokens, x_stride,
              first_stage * kStage, s.stages_per_block * kStage, shared + s.x);
  ptx::copy_async_commit();

  // This warp's work: stages first_stage + slice + i * slices of one block of rows after another. `ahead` is the stage
  // to copy next, of block `block_ahead`, or none if it is not below end_stage; a row of tiles that does not exist is
  // the last that does.
  int ahead = first_stage + slice, block_ahead = first_block, row_ahead = first_block * c.row_tiles + row_tile;
  Copier copier(weight,
                static_cast<int>(p.stack.weight_of(batch)) * s.tile_rows + (row_ahead < s.tile_rows ? row_ahead : 0),
                s.k_tiles, s.k_blocks, lane);
  // The stages under way. No other warp has anything to do with them.
  const ptx::SharedAddress ring = ptx::shared_address(shared + s.rings + warp * s.ring_bytes);
  int slot = 0;  // the stage that is copied to and read from
  const auto next_slot = [&] { slot = slot == (kDepth - 1) * Copier::bytes() ? 0 : slot + Copier::bytes(); };
  const auto copy = [&]() __attribute__((always_inline)) {
    if (ahead < end_stage) {
      copier.copy(ring + slot, ahead, s.k_tiles, lane);
      ahead += c.slices;
      if (ahead >= end_stage) {
        const int rows = block_stride * c.row_tiles;
        block_ahead += block_stride, row_ahead += rows;
        if (block_ahead < s.row_blocks) ahead = first_stage + slice;
        if (row_ahead < s.tile_rows) copier.advance(weight, rows, s.k_tiles, s.k_blocks);
      }
    }
    ptx::copy_async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kDepth; ++i, next_slot()) copy();
  ptx::copy_async_wait<kDepth>();  // for x
  __syncthreads();

  // Rows of x beyond `tokens` reach only sums that are never stored: the last row again.
  const int x_row = (lane & 7) < s.tokens ? lane & 7 : s.tokens - 1;
  const ptx::SharedAddress x_lane =
      ptx::shared_address(shared + s.x) + x_row * x_row_bytes(s.stages_per_block * kStage) + x_piece(lane & ~7, x_row);
  const int block_stages = end_stage - first_stage;
  constexpr int kXBytes = kStage * 2, kSumBytes = kStage / 16 / G::kSteps * 32;  // of a stage
  if constexpr (F::kHasMinimum || !A::kExact) {
#pragma unroll 1
    for (int stage = warp; stage < block_stages; stage += c.row_tiles * c.slices) {
      auto* to = reinterpret_cast<float2*>(shared + s.x_sums + stage * kSumBytes) + (lane & 3);
      sum_groups<F, T, G>(to, x_lane + stage * kXBytes, lane);
    }
    __syncthreads();
  }
  if (c.cluster == 2) ptx::cluster_wait();

  const ptx::SharedAddress x_end = x_lane + block_stages * kXBytes;
  const bool plain = p.epilogue.empty();  // asked once, not for each result
  int buffer = 0;
#pragma unroll 1
  for (int block = first_block; block < s.row_blocks; block += block_stride) {
    float sums[4] = {};
    ptx::SharedAddress x = x_lane + slice * kXBytes;
    ptx::SharedAddress x_sums = ptx::shared_address(shared + s.x_sums) + slice * kSumBytes + (lane & 3) * 8;
#pragma unroll 1
    for (; x < x_end; x += c.slices * kXBytes, x_sums += c.slices * kSumBytes, next_slot()) {
      ptx::copy_async_wait<kDepth - 1>();
      LaneStage<F> w;
      w.template load<G::kSteps>(weight, {}, 0, 0, 0, lane, FromShared{ring + slot, lane});
      copy();
      multiply_few<F, T, G>(sums, weight, w, x, x_sums);
    }

    // The sum over the slices, in their order, then over the two blocks of a cluster: each has eight of sixteen rows.
    float* partial = reinterpret_cast<float*>(shared + s.partial) + buffer * c.slices * c.row_tiles * 128;
    reinterpret_cast<float4*>(partial)[threadIdx.x] =
        make_float4(sums[0] * A::kUnit, sums[1] * A::kUnit, sums[2] * A::kHighUnit, sums[3] * A::kHighUnit);
    __syncthreads();
    const auto sum_of = [&](unsigned tile, unsigned row, unsigned token) {
      const float* source = partial + tile * 128 + (row % 8 * 4 + token / 2) * 4 + row / 8 * 2 + token % 2;
      float sum = 0.0f;
#pragma unroll 4
      for (int i = 0; i < c.slices; ++i) sum += source[i * c.row_tiles * 128];
      return sum;
    };
    if (c.cluster == 2) {
      for (unsigned e = threadIdx.x; e < static_cast<unsigned>(exchange.cells); e += threads) {
        const unsigned token = e / 8 * s.inverse_tiles >> 20, tile = e / 8 - token * c.row_tiles;
        exchange.send(e, sum_of(tile, e % 8 + (rank ^ 1) * 8, token));
      }
      exchange.wait();
    }
    const auto result = [&](unsigned tile, unsigned row, unsigned token) {
      const float sum = sum_of(tile, row, token);
      return c.cluster == 2 ? sum + exchange.part_of_other((token * c.row_tiles + tile) * 8 + row % 8) : sum;
    };
    const int rows_log = c.cluster == 2 ? 3 : 4, gated = p.epilogue.gated;  // two tiles make one of a gated result
    const unsigned results = (c.row_tiles << rows_log >> gated) * s.tokens;
    for (unsigned e = threadIdx.x; e < results; e += threads) {
      const unsigned row = (e & ((1u << rows_log) - 1)) + rank * 8, i = e >> rows_log;
      const unsigned token = i * (s.inverse_tiles << gated) >> 20, tile = (i << gated) - token * c.row_tiles;
      const unsigned n = (block * c.row_tiles + tile) * kTileN + row;
      if (n >= p.n) continue;
      const float sum = result(tile, row, token), up = gated ? result(tile + 1, row, token) : 0.0f;
      if (plain) {
        store_scalar(p.out, (batch * p.m + token) * p.n + n, p.out_type, sum);
      } else {
        store_result(p, batch, token, n, sum, up);
      }
    }
    if (c.cluster == 2) exchange.finish_round();
    buffer ^= 1;  // so one barrier a block of rows is enough
  }
}

}  // namespace jax_qgemm
