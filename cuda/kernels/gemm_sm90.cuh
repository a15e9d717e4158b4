// out = x @ w by wgmma, for many rows of x and x in f16 or bf16: the time of the tensor cores.
//
// The product is computed transposed, w being the A operand in registers and x the B operand in shared memory. A thread
// block computes tiles of 128 or 256 rows of n by Tokens rows of x, one after the other. One warp has the copy engine
// bring stages of x and of w into a ring of slots, over all of k; two warpgroups read their codes from there, turn them
// into 16-bit values, 16 of k ahead of the tensor cores, and multiply.
//
// Thread blocks come in clusters of two. They have neighbouring rows of n and the same rows of x, of which each brings
// half to both, so that the L2 cache delivers less; or, for the last tiles, the same tile and half of k each.
#pragma once

#include "kernels/gemm_sm90_tiles.cuh"
#include "tile/value_operand.cuh"

namespace jax_qgemm {

// Span: k-steps that share a scale, 1, 2 or 4.
template <class F, int Tokens, int Blocks, int Span>
struct GemmSm90Stage {
  static constexpr int kTiles = Tokens == 256 || Blocks == 2 ? 1 : 2;  // of 64 k
  using Staged = StagedWeight<F, kTiles, Span, 8 * Blocks>;
};

template <class F, int Tokens, int Blocks, int Span, class Stage = GemmSm90Stage<F, Tokens, Blocks, Span>>
struct GemmSm90 : Stage, GemmSm90Tiles<Tokens, Blocks, Stage::kTiles, 2, Stage::Staged::kBytes> {
  static constexpr bool kCodesAlone = false;
  static constexpr int kInFlight = Blocks == 2 ? 3 : 2;  // wgmmas of a warpgroup, while the next operand is made
};

template <class F, class T, int Tokens, int Blocks, int Span>
__global__ void __cluster_dims__(2) __launch_bounds__(GemmSm90<F, Tokens, Blocks, Span>::kThreads, 1)
    gemm_sm90(const Product p, const GemmSm90Walk walk, const __grid_constant__ ProductMaps maps) {
  using S = GemmSm90<F, Tokens, Blocks, Span>;
  using Operand = ValueOperand<F, T>;
  // Uniform: behind branches that might diverge, ptxas would not keep the ring's state in uniform registers.
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / 128), rank = ptx::cluster_rank();
  auto* shared = static_cast<char*>(ptx::dynamic_shared());
  typename S::Slot slot = {shared};
  start_ring<F, S>(p.w, maps, slot);

  if (warpgroup == S::kConsumers) {
    fill_ring<F, S>(p, walk, maps, slot);
  } else {
    ptx::raise_registers<S::kConsumerRegisters>();
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row = warpgroup * (4 * Blocks) + static_cast<int>(threadIdx.x) / 32 % 4;  // of tiles, in the block
    constexpr int kSteps = 4 * Blocks, kBuffers = 4;
    using Staged = typename S::Staged;

    // A tile of 64 k is kSteps steps, of 16 k for each block of rows in turn. While up to kInFlight wgmmas run, the
    // operand of the next step is made, out of the codes of this tile or, at its end, of the next one, which have been
    // read some steps ago.
    Staged staged[Blocks];
#pragma unroll
    for (int b = 0; b < Blocks; ++b) staged[b] = Staged(p.w, row + 4 * b, lane);
    struct Codes {
      typename Staged::Tile of[Blocks];
    } codes, next;
    typename Operand::Group group[Blocks];
    uint32_t a[kBuffers][4];
    const auto read = [&](Codes& out, typename S::Slot from, int i, int stage) __attribute__((always_inline)) {
#pragma unroll
      for (int b = 0; b < Blocks; ++b) staged[b].load(out.of[b], from.w(), i, stage * S::kTiles + i);
    };
    const auto decode = [&](int step) __attribute__((always_inline)) {
      const int b = step % Blocks, k_step = step / Blocks;
      if (k_step % Span == 0) {
        AffinePair affine = codes.of[b].affine(p.w, k_step);
        if constexpr (F::kGroup == 0) {
          // A channel's scale is applied to its sums: the integers are exact.
          if (p.w.group == 0) affine.row[0].scale = affine.row[1].scale = 1.0f;
        }
        group[b] = Operand::prepare(affine);
      }
      Operand::decode(a[step % kBuffers], codes.of[b].codes, k_step, group[b]);
    };

    for (int item = static_cast<int>(blockIdx.x) / 2; item < walk.items; item += static_cast<int>(gridDim.x) / 2) {
      const GemmSm90Walk::Tile tile = walk.tile(item, rank);
      if (walk.skipped(tile)) continue;
      float sums[Blocks][Tokens / 2] = {};
      // A slot is free when both blocks have read it; of a split k, where the other has its own, by two arrivals here.
      const ptx::ClusterAddress empty =
          ptx::cluster_address(typename S::Slot{shared}.empty(), tile.split ? rank : lane % 2);
      const auto release = [&](int index, bool on) __attribute__((always_inline)) {
        __syncwarp();
        ptx::barrier_arrive_if(on && lane < 2, empty, index);
      };
      int before = 0;
      ptx::barrier_wait(slot.full(), slot.parity);
      read(codes, slot, 0, tile.first_stage);
      decode(0);
      for (int stage = tile.first_stage; stage < tile.last_stage; ++stage) {
        const typename S::Slot now = slot;
        slot.advance();
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) {
          const uint64_t x = swizzled_operand(now.x(i));
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            ptx::wgmma_fence();
            wgmma<T>(sums[step % Blocks], a[step % kBuffers], operand_of_step(x, step / Blocks));
            ptx::wgmma_commit();
            ptx::wgmma_wait_but<S::kInFlight>();
            if (i == 0 && step == S::kInFlight - 1) release(before, stage != tile.first_stage);
            if (step == kSteps - 1 - S::kInFlight) {
              if (i + 1 < S::kTiles) {
                read(next, now, i + 1, stage);
              } else {
                // Behind the last stage, anything.
                if (stage + 1 < tile.last_stage) ptx::barrier_wait(slot.full(), slot.parity);
                read(next, slot, 0, stage + 1);
              }
            }
            if (step == kSteps - 1) codes = next;
            decode((step + 1) % kSteps);
          }
        }
        before = now.index;
      }
#pragma unroll
      for (int b = 0; b < Blocks; ++b) ptx::wgmma_wait(sums[b]);
      release(before, true);

      if constexpr (F::kGroup == 0) {
        if (p.w.group == 0) {
          const int weight_row = static_cast<int>(p.stack.weight_of(tile.batch)) * walk.tile_rows;
          scale_channels<F>(p.w, weight_row, tile.row_block * S::kRowTiles + row, walk.tile_rows, sums);
        }
      }
      int64_t token = tile.token_block * int64_t{Tokens};
      if (tile.split) {
        add_halves<S>(shared, sums);
        token += rank * (Tokens / 2);
      }
      store_item<S, T>(p, walk, item, warpgroup, tile, token, shared, sums);
    }
  }
  // No block may end while the other can still write to it or arrive at its barriers.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace jax_qgemm
