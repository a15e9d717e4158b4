// out = x @ w by wgmma, for many rows of x and x in f16 or bf16: the time of the tensor cores.
//
// The product is computed transposed, w being the A operand in registers and x the B operand in shared memory. A thread
// block computes tiles of 128 rows of n by kTokens rows of x, one after the other. One warp has the copy engine bring x
// into a ring of slots, over all of k; two warpgroups of 64 rows each read their weights straight from device memory
// into registers, a few tiles of k ahead, turn them into 16-bit values and multiply. While a tile of 64 k is multiplied
// the next is decoded, and two warpgroups keep the tensor cores busy in turn. Two thread blocks may form a cluster,
// with neighbouring rows of n and the same rows of x: each brings half of x to both, which halves what the L2 cache
// delivers.
#pragma once

#include "kernels/gemm_sm90_walk.h"
#include "tile/lane_stage.cuh"
#include "tile/store.cuh"
#include "tile/tma.cuh"
#include "tile/value_operand.cuh"
#include "tile/wgmma.cuh"

namespace jax_qgemm {

template <class F, int Tokens>
struct GemmSm90 {
  static constexpr int kTokens = Tokens;
  static constexpr int kConsumers = 2;  // warpgroups of 4 row tiles
  static constexpr int kRowTiles = 4 * kConsumers;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  // Registers: as many tiles of codes as the sums leave room for, and the group values of the stages they belong to,
  // of two at least.
  static constexpr int kCodeTiles = Tokens == 256 ? 4 : 8;
  static constexpr int kCodeStages = kCodeTiles / kStageTiles<F>, kGroupStages = kCodeStages < 2 ? 2 : kCodeStages;

  // Shared memory, beginning with the ring of x. A slot is [tile of k][token][64].
  static constexpr int kSlotTiles = Tokens == 256 ? 1 : 2;
  static constexpr int kTileBytes = Tokens * kTileK * 2, kSlotBytes = kSlotTiles * kTileBytes;
  static constexpr int kChunk = 64;      // tokens whose sums pass through shared memory at a time
  static constexpr int kSumStride = 68;  // floats a token: lanes of a warp write to 32 banks
  static constexpr int kSumFloats = kChunk * kSumStride;
  static constexpr int kSumBytes = kConsumers * kSumFloats * 4, kBarrierBytes = 128;
  static constexpr int kMaxSlots = 8, kSharedBytes = 227 << 10;
  static constexpr int kFit = (kSharedBytes - kSumBytes - kBarrierBytes) / kSlotBytes;
  static constexpr int kSlots = kFit < kMaxSlots ? kFit : kMaxSlots;
  static constexpr int kSums = kSlots * kSlotBytes, kBarriers = kSums + kSumBytes, kShared = kBarriers + kBarrierBytes;
  static_assert(2 * kSlots * 8 <= kBarrierBytes);

  // A slot of the ring, and the parity of the round that it is in.
  struct Slot {
    char* shared;
    int index = 0, parity = 0;

    // Barriers: x has come; every consumer warp has read it.
    __device__ __forceinline__ uint64_t* full() const {
      return reinterpret_cast<uint64_t*>(shared + kBarriers) + index;
    }
    __device__ __forceinline__ uint64_t* empty() const { return full() + kSlots; }
    __device__ __forceinline__ ptx::SharedAddress tile(int i) const {
      return ptx::shared_address(shared + index * kSlotBytes + i * kTileBytes);
    }
    __device__ __forceinline__ void advance() {
      if (++index == kSlots) index = 0, parity ^= 1;
    }
  };
};

// One thread's work: x of all items of the block into the ring, in boxes of x_rows rows.
template <class F, int Tokens>
__device__ __forceinline__ void bring_x(const Product& p, const GemmSm90Walk& walk, const CUtensorMap* x_map,
                                        int x_rows, typename GemmSm90<F, Tokens>::Slot slot) {
  using S = GemmSm90<F, Tokens>;
  const bool paired = walk.cluster == 2;
  const int rank = ptx::cluster_rank();
  ptx::prefetch_map(x_map);
  for (int item = walk.first(blockIdx.x); item < walk.items; item += walk.stride(gridDim.x)) {
    const GemmSm90Walk::Tile tile = walk.tile(item, rank);
    const int row = tile.batch * static_cast<int>(p.m) + tile.token_block * Tokens + rank * (Tokens / 2);
#pragma unroll 1
    for (int k_tile = 0; k_tile < walk.stages * kStageTiles<F>; k_tile += S::kSlotTiles) {
      ptx::barrier_wait(slot.empty(), slot.parity ^ 1);
      ptx::barrier_expect(slot.full(), S::kSlotTiles * walk.cluster * x_rows * kTileK * 2);
#pragma unroll
      for (int i = 0; i < S::kSlotTiles; ++i) {
        const ptx::SharedAddress to = slot.tile(i) + rank * (S::kTileBytes / 2);
        if (paired) {
          ptx::load_box_for_both(to, x_map, (k_tile + i) * kTileK, row, slot.full());
        } else {
          ptx::load_box(to, x_map, (k_tile + i) * kTileK, row, slot.full());
        }
      }
      slot.advance();
    }
  }
  // A block whose barriers the other has still to arrive at must not end.
  for (int i = 0; paired && i < S::kSlots; ++i) {
    ptx::barrier_wait(slot.empty(), slot.parity ^ 1);
    slot.advance();
  }
}

// A warpgroup's part of a tile of the result: in pieces through shared memory, which turns it around.
template <class F, int Tokens>
__device__ __forceinline__ void store_tile(const Product& p, const GemmSm90Walk::Tile& tile, char* shared,
                                           const float (&sums)[Tokens / 2]) {
  using S = GemmSm90<F, Tokens>;
  const int warpgroup = static_cast<int>(threadIdx.x) / 128, warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  auto* buffer = reinterpret_cast<float*>(shared + S::kSums) + warpgroup * S::kSumFloats;
  const int64_t row = tile.row_block * int64_t{S::kRowTiles * kTileN} + warpgroup * 64;
#pragma unroll 1
  for (int chunk = 0; chunk < Tokens / S::kChunk; ++chunk) {
    ptx::sync_named(1 + warpgroup, 128);
#pragma unroll
    for (int j = 0; j < Tokens / 8; ++j) {
      if (j / (S::kChunk / 8) != chunk) continue;
      float* to = buffer + (j % (S::kChunk / 8) * 8 + lane % 4 * 2) * S::kSumStride + warp * kTileN + lane / 4;
      to[0] = sums[4 * j];
      to[S::kSumStride] = sums[4 * j + 1];
      to[8] = sums[4 * j + 2];
      to[S::kSumStride + 8] = sums[4 * j + 3];
    }
    ptx::sync_named(1 + warpgroup, 128);
    const int64_t token = tile.token_block * int64_t{Tokens} + chunk * S::kChunk;
    store_block<S::kChunk, S::kSumStride>(p, tile.batch, token, row, buffer);
  }
}

// The group values of a stage as scales: of k-step `step`, even where the group size is known at run time only.
template <class F>
__device__ __forceinline__ AffinePair affine_of_step(const GroupRegisters<F>& groups, const Weight& w, int step) {
  if constexpr (F::kGroup == 0) {
    return groups.affine_of_any(w, step);
  } else {
    return groups.template affine<F::kGroup / 16>(w, step);
  }
}

template <class F, class T, int Tokens>
__global__ void __launch_bounds__(GemmSm90<F, Tokens>::kThreads, 1)
    gemm_sm90(const Product p, const GemmSm90Walk walk, const __grid_constant__ CUtensorMap x_map, const int x_rows) {
  using S = GemmSm90<F, Tokens>;
  constexpr int kTiles = kStageTiles<F>;
  const int warpgroup = static_cast<int>(threadIdx.x) / 128;
  auto* shared = static_cast<char*>(ptx::dynamic_shared());
  typename S::Slot slot = {shared};
  if (threadIdx.x == 0) {
    for (auto each = slot; each.parity == 0; each.advance()) {
      ptx::barrier_init(each.full(), 1);
      ptx::barrier_init(each.empty(), 4 * S::kConsumers * walk.cluster);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  if (walk.cluster == 2) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }

  if (warpgroup == S::kConsumers) {
    ptx::lower_registers<S::kProducerRegisters>();
    if (threadIdx.x % 128 == 0) bring_x<F, Tokens>(p, walk, &x_map, x_rows, slot);
  } else {
    ptx::raise_registers<S::kConsumerRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = static_cast<int>(threadIdx.x) % 32;

    // The weights: rings of codes and group values in registers, refilled as soon as a tile or stage has been
    // multiplied. `ahead` is the stage to load next. Stages are counted up to a whole number of rounds of the rings, so
    // that an output tile begins at their beginning.
    LaneCodes<F> codes[S::kCodeTiles];
    GroupRegisters<F> groups[S::kGroupStages];
    struct Position {
      int item, stage;
      LaneRow<F> row;
    };
    const auto at_item = [&](int item) -> Position {
      const GemmSm90Walk::Tile tile = walk.tile(item < walk.items ? item : walk.first(blockIdx.x), ptx::cluster_rank());
      const int row = tile.row_block * S::kRowTiles + warpgroup * 4 + warp;
      return {item, 0,
              LaneRow<F>(p.w, tile.batch * walk.tile_rows + (row < walk.tile_rows ? row : walk.tile_rows - 1),
                         walk.k_tiles, walk.k_blocks, lane)};
    };
    Position ahead = at_item(walk.first(blockIdx.x));
    // Tile `tile` of the stage that takes the place in the ring of codes of stage `round`.
    const auto fetch = [&](int round, int tile) __attribute__((always_inline)) {
      constexpr bool kInPlace = S::kGroupStages == S::kCodeStages;
      if (ahead.stage < walk.stages && ahead.item < walk.items) {
        ahead.row.load_codes(codes[(round * kTiles + tile) % S::kCodeTiles], p.w, walk.k_tiles, ahead.stage, tile,
                             lane);
        if (tile == (kInPlace ? kTiles - 1 : 0)) {
          ahead.row.load_groups(groups[(round + (kInPlace ? 0 : 1)) % S::kGroupStages], p.w, walk.k_blocks,
                                ahead.stage);
        }
      }
      if (tile == kTiles - 1 && ++ahead.stage == walk.whole_stages) {
        ahead = at_item(ahead.item + walk.stride(gridDim.x));
      }
    };
#pragma unroll
    for (int round = S::kGroupStages - S::kCodeStages; round < S::kGroupStages; ++round) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) fetch(round, tile);
    }

    uint32_t a[2][4][4];  // of a tile of 64 k: in use, and next
    const auto decode = [&](int round, int tile) __attribute__((always_inline)) {
      constexpr int kSpan = F::kGroup == 16 ? 1 : F::kGroup == 0 || F::kGroup == 32 ? 2 : 4;  // steps of one scale
      AffinePair affine;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        if (step % kSpan == 0) affine = affine_of_step(groups[round % S::kGroupStages], p.w, tile * 4 + step);
        ValueOperand<F, T>::decode(a[tile % 2][step], codes[(round * kTiles + tile) % S::kCodeTiles], step, affine);
      }
    };

    for (int item = walk.first(blockIdx.x); item < walk.items; item += walk.stride(gridDim.x)) {
      float sums[Tokens / 2] = {};
      decode(0, 0);
      for (int first = 0; first < walk.whole_stages; first += S::kGroupStages) {
#pragma unroll
        for (int round = 0; round < S::kGroupStages; ++round) {
          const bool exists = first + round < walk.stages;
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            // Between the first wgmma and the wait there must be no branch, or ptxas runs them one by one.
            if (exists) {
              if (tile % S::kSlotTiles == 0) ptx::barrier_wait(slot.full(), slot.parity);
              const uint64_t x = swizzled_operand(slot.tile(tile % S::kSlotTiles));
              ptx::wgmma_fence();
#pragma unroll
              for (int step = 0; step < 4; ++step) wgmma<T>(sums, a[tile % 2][step], x + step * 2);
              ptx::wgmma_commit();
              if (tile + 1 < kTiles) {
                decode(round, tile + 1);
              } else {
                decode(round + 1, 0);
              }
              ptx::wgmma_wait(sums);
              if (tile % S::kSlotTiles == S::kSlotTiles - 1) {
                if (lane < walk.cluster) ptx::barrier_arrive(slot.empty(), lane);
                slot.advance();
              }
            }
            fetch(round, tile);
          }
        }
      }

      store_tile<F, Tokens>(p, walk.tile(item, ptx::cluster_rank()), shared, sums);
    }
  }
}

}  // namespace jax_qgemm
