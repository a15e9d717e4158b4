// out = x @ w by wgmma for few rows of x, in f16 or bf16: the time to read the weights, where gemv's mma.sync would
// take longer.
//
// The product is computed transposed, w being the A operand in registers and x the B operand in shared memory, where
// the copy engine brings it. Each warp of a warpgroup copies its own 16 rows of n into a ring in shared memory, as in
// gemv, some stages of k ahead and across its tiles of rows without a pause, and decodes the next 64 k while those
// before are multiplied. The warpgroups of a thread block, or of two in a cluster, divide rows and k; partial sums of k
// meet in the shared memory of the block that owns the tokens, while the next tile of rows is under way.
#pragma once

#include "kernels/gemv_sm90_config.cuh"
#include "tile/partial_sums.cuh"
#include "tile/stage_copier.cuh"
#include "tile/store.cuh"
#include "tile/value_operand.cuh"
#include "tile/x_slots.cuh"

namespace jax_qgemm {

template <class F, class T, int Tokens, class G>
__global__ void __launch_bounds__(128 * kGemvSm90Warpgroups, 1)
    gemv_sm90(const Product p, const GemvSm90Sizes s, const __grid_constant__ CUtensorMap x_map) {
  using Slots = XSlots<Tokens>;
  using Operand = ValueOperand<F, T>;
  constexpr int kTiles = kStageTiles<F>, kPieces = kTiles / Slots::kTiles, kDepth = kCopyDepth<F>;
  const GemvSm90Config& c = s.config;
  Weight weight = with_grouping<F, G>(p.w);
  if constexpr (!T::kIsBF16) weight.scale_type = ScaleType::kF16;  // others are refused
  // Opaque: the compiler would compute it, and what follows from it, again and again in the loop.
  const int lane = ptx::opaque(static_cast<int>(threadIdx.x) % 32);
  const int warp_of_block = ptx::uniform(static_cast<int>(threadIdx.x) / 32), warp = warp_of_block % 4;
  const int warpgroup = warp_of_block / 4, slice = warpgroup / c.rows, row = warpgroup - slice * c.rows;
  const int rank = c.cluster == 2 ? ptx::cluster_rank() : 0;
  const int cluster = static_cast<int>(blockIdx.x) / c.cluster, batch = static_cast<int>(blockIdx.y);
  const int first_tile = s.first_tile(cluster), tiles = s.tiles(cluster);
  const int passes = (tiles + c.rows - 1) / c.rows;
  const int first_stage = (rank * c.slices + slice) * s.steps;
  const int stages = std::clamp(s.stages - first_stage, 0, s.steps), end_stage = first_stage + stages;

  auto* shared = static_cast<char*>(ptx::dynamic_shared());
  auto* barriers = reinterpret_cast<uint64_t*>(shared + s.barriers);
  uint64_t* sum_barriers = barriers + 2 * c.slices * c.slots;
  const PartialSums<Tokens> partial = {
      reinterpret_cast<float4*>(shared + s.parts) + row * c.buffers * c.slices * Tokens * 16,
      sum_barriers + row * c.buffers,
      sum_barriers + (c.rows + row) * c.buffers,
      c.slices,
      c.cluster,
      rank,
      c.buffers};
  Slots x(barriers + 2 * slice * c.slots, shared + s.x + slice * c.slots * Slots::kBytes, c.slots, stages * kPieces,
          s.x_stays);
  const auto load_x = [&](uint64_t* barrier, ptx::SharedAddress to, int piece) {
    const int k = first_stage * kStageOf<F> + piece * GemvSm90Sizes::kPiece;
    ptx::barrier_expect(barrier, Slots::kTiles * s.tokens * kTileK * 2);
#pragma unroll
    for (int i = 0; i < Slots::kTiles; ++i) {
      ptx::load_box(to + i * Slots::kTileBytes, &x_map, k + i * kTileK, batch * s.tokens, barrier);
    }
  };

  // x first: behind the weights it would come late.
  if (row == 0 && warp == 0 && lane == 0) x.start(4 * c.rows, passes, load_x);
  if (slice == 0 && warp == 1 && lane == 0) {
    partial.start();
    ptx::barrier_init_fence();
  }

  // `ahead` is what to copy next; a row of tiles that does not exist is another that does.
  struct Position {
    int tile, stage;
  };
  Position ahead = {stages > 0 ? row : tiles, first_stage};
  const auto exists = [&](int tile) { return (first_tile + tile) * 4 + warp < s.tile_rows; };
  StageCopier<F, G> copier(weight, batch * s.tile_rows + (exists(row) ? (first_tile + row) * 4 + warp : 0), s.k_tiles,
                           s.k_blocks, lane);
  const int stage_bytes = ptx::opaque(s.stage_bytes), last_slot = (kDepth - 1) * stage_bytes;
  char* const ring = shared + s.rings + warp_of_block * kDepth * s.stage_bytes;
  // The stage of the ring that is read and copied to. No other warp has anything to do with it.
  int slot = 0;
  const auto copy = [&]() __attribute__((always_inline)) {
    if (ahead.tile < tiles) {
      copier.copy(ptx::shared_address(ring) + slot, ahead.stage, s.k_tiles, lane);
      if (++ahead.stage == end_stage) {
        ahead = {ahead.tile + c.rows, first_stage};
        if (exists(ahead.tile)) copier.advance(weight, 4 * c.rows, s.k_tiles, s.k_blocks);
      }
    }
    ptx::copy_async_commit();
    slot = slot == last_slot ? 0 : slot + stage_bytes;
  };
#pragma unroll 1
  for (int i = 0; i < kDepth; ++i) copy();

  if (c.cluster == 2) ptx::cluster_arrive();
  __syncthreads();

  LaneStage<F> w;
  typename Operand::Group group;
  uint32_t a[2][4][4];  // of a tile: in use, and next
  const auto take = [&]() __attribute__((always_inline)) {
    ptx::copy_async_wait<kDepth - 1>();
    w.template load<G::kSteps>(weight, {}, 0, 0, 0, lane, FromShared{ring + slot, lane});
  };
  const auto decode = [&](int i) __attribute__((always_inline)) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const int at = i * 4 + step;
      if (at % G::kSteps == 0) group = Operand::prepare(w.groups.template affine<G::kSteps>(weight, at));
      Operand::decode(a[i % 2][step], w.codes[i], step, group);
    }
  };

  take();
  copy();
  decode(0);
  const int lag = c.buffers - 1;  // passes between a tile's last product and its results
#pragma unroll 1
  for (int pass = 0; pass < passes + lag; ++pass) {
    const int tile = row + pass * c.rows;
    if (pass < passes && tile < tiles) {
      float sums[Tokens / 2] = {};
#pragma unroll 1
      for (int stage = 0; stage < stages; ++stage) {
#pragma unroll
        for (int i = 0; i < kTiles; i += 2) {
          const uint64_t x_operand = x.operand();
          // Between the first wgmma and the last wait there must be no branch, or ptxas runs them one by one.
          const auto multiply = [&](int tile) __attribute__((always_inline)) {
            ptx::wgmma_fence();
#pragma unroll
            for (int step = 0; step < 4; ++step) {
              wgmma<T>(sums, a[tile][step], operand_of_step(x_operand, tile * Slots::kTileBytes / 32 + step));
            }
            ptx::wgmma_commit();
          };
          x.wait();
          multiply(0);
          decode(i + 1);
          multiply(1);
          ptx::wgmma_wait_but<1>();
          if (i + 2 == kTiles) take();
          decode((i + 2) % kTiles);
          ptx::wgmma_wait(sums);
          x.release(load_x);
          if (i + 2 == kTiles) copy();
        }
      }
      if (c.cluster == 2 && pass == 0) ptx::cluster_wait();  // the other block's barriers are there
      partial.send(sums, slice, pass);
    } else if (pass < passes) {
      // A last pass in which this warpgroup has no rows: the ring of x goes on.
      for (int i = 0; i < stages * kPieces; ++i) {
        x.wait();
        x.release(load_x);
      }
      if (c.cluster == 2 && pass == 0) ptx::cluster_wait();
    }

    // Results of the pass before, or of this one.
    const int done = pass - lag, done_tile = tile - lag * c.rows;
    if (done < 0 || done_tile >= tiles) continue;
    const int reader = (slice + done) % c.slices;
    if (reader >= partial.readers()) continue;
    auto* scratch = reinterpret_cast<float*>(shared + s.scratch) + warpgroup * GemvSm90Sizes::kScratchFloats;
    constexpr int kStride = GemvSm90Sizes::kScratchFloats / 8;
    partial.wait(done);
    for (int i = reader; i < partial.token_tiles(); i += c.slices) {
      const int token = (rank * partial.token_tiles() + i) * 8;
      if (token >= s.tokens) break;
      const float4 sum = partial.sum(done, i);
      float* to = scratch + lane % 4 * 2 * kStride + warp * kTileN + lane / 4;
      to[0] = sum.x;
      to[kStride] = sum.y;
      to[8] = sum.z;
      to[kStride + 8] = sum.w;
      ptx::sync_named(1 + warpgroup, 128);
      store_block<8, kStride>(p, batch, token, (first_tile + done_tile) * int64_t{kGemvSm90Rows}, scratch);
      ptx::sync_named(1 + warpgroup, 128);
    }
    if (done_tile + c.buffers * c.rows < tiles) partial.release(done);
  }
}

}  // namespace jax_qgemm
