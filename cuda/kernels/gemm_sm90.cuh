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

#include <cuda.h>

#include "kernels/gemm_sm90_walk.h"
#include "tile/store.cuh"
#include "tile/store_transposed.cuh"
#include "tile/value_operand.cuh"
#include "tile/wgmma.cuh"

namespace jax_qgemm {

// Blocks: of 64 rows of n, a warpgroup. Span: k-steps that share a scale, 1, 2 or 4.
template <class F, int Tokens, int Blocks, int Span>
struct GemmSm90 {
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kRowTiles = 4 * Blocks * kConsumers, kRows = kRowTiles * kTileN;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (65536 / kThreads & ~7) * (kConsumers + 1));
  static constexpr int kInFlight = Blocks == 2 ? 3 : 2;  // wgmmas of a warpgroup, while the next operand is made

  // Shared memory, beginning with the ring. A slot holds x as [tile of k][token][64], and then w.
  static constexpr int kTiles = Tokens == 256 || Blocks == 2 ? 1 : 2;  // of 64 k, a stage
  using Staged = StagedWeight<F, kTiles, Span, kRowTiles>;
  static constexpr int kTileBytes = Tokens * kTileK * 2, kXBytes = kTiles * kTileBytes;
  static constexpr int kSlotBytes = (kXBytes + Staged::kBytes + 1023) / 1024 * 1024;
  static constexpr int kChunk = 32;      // tokens whose sums pass through shared memory at a time
  static constexpr int kSumStride = 68;  // floats a token: lanes of a warp write to 32 banks
  static constexpr int kSumFloats = kChunk * kSumStride;
  static_assert(kTransposedUnits * kTransposedUnitBytes <= kSumFloats);  // a warp's fourth
  static constexpr int kSumBytes = kConsumers * kSumFloats * 4, kBarrierBytes = 128;
  static constexpr int kMaxSlots = 8, kSharedBytes = 227 << 10;
  static constexpr int kFit = (kSharedBytes - kSumBytes - kBarrierBytes) / kSlotBytes;
  static constexpr int kSlots = kFit < kMaxSlots ? kFit : kMaxSlots;
  static constexpr int kSums = kSlots * kSlotBytes, kBarriers = kSums + kSumBytes, kShared = kBarriers + kBarrierBytes;
  static_assert(2 * kSlots * 8 <= kBarrierBytes);
  // Half of a tile's sums, which go to the other thread block when two have split k, take the place of the ring.
  static constexpr int kHalfSums = Tokens / 4;
  static_assert(Blocks * kHalfSums * kConsumers * 128 * 4 <= kSums);

  // A slot of the ring, and the parity of the round that it is in.
  struct Slot {
    char* shared;
    int index = 0, parity = 0;

    // Barriers: x and w have come; every consumer warp has read them.
    __device__ __forceinline__ uint64_t* full() const {
      return reinterpret_cast<uint64_t*>(shared + kBarriers) + index;
    }
    __device__ __forceinline__ uint64_t* empty() const { return full() + kSlots; }
    __device__ __forceinline__ ptx::SharedAddress x(int tile) const {
      return ptx::shared_address(shared) + (index * kSlotBytes + tile * kTileBytes);
    }
    __device__ __forceinline__ ptx::SharedAddress w() const { return x(kTiles); }
    __device__ __forceinline__ void advance() {
      if (++index == kSlots) index = 0, parity ^= 1;
    }
  };
};

// One thread's work: x and w of all items of the block into the ring.
template <class F, int Tokens, int Blocks, int Span>
__device__ __forceinline__ void bring_stages(const Product& p, const GemmSm90Walk& walk, const ProductMaps& maps,
                                             typename GemmSm90<F, Tokens, Blocks, Span>::Slot slot) {
  using S = GemmSm90<F, Tokens, Blocks, Span>;
  const int rank = ptx::cluster_rank();
#pragma unroll 1
  for (int item = static_cast<int>(blockIdx.x) / 2; item < walk.items; item += static_cast<int>(gridDim.x) / 2) {
    const GemmSm90Walk::Tile tile = walk.tile(item, rank);
    if (walk.skipped(tile)) continue;
    const int token = tile.batch * static_cast<int>(p.m) + tile.token_block * Tokens;
    const int first_row = static_cast<int>(p.stack.weight_of(tile.batch)) * walk.tile_rows;  // of the weight
    const int tile_row = first_row + tile.row_block * S::kRowTiles;
#pragma unroll 1
    for (int stage = tile.first_stage; stage < tile.last_stage; ++stage) {
      ptx::barrier_wait(slot.empty(), slot.parity ^ 1);
      ptx::barrier_expect(slot.full(), S::kXBytes + walk.boxes.bytes);
      load_planes<F, typename S::Staged>(p.w, walk.boxes, maps.planes, slot.w(), stage, tile_row, slot.full());
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) {
        const int k = (stage * S::kTiles + i) * kTileK;
        if (tile.split) {
          ptx::load_box(slot.x(i), &maps.x, k, token, slot.full());
          ptx::load_box(slot.x(i) + S::kTileBytes / 2, &maps.x, k, token + Tokens / 2, slot.full());
        } else {
          ptx::load_box_for_both(slot.x(i) + rank * (S::kTileBytes / 2), &maps.x, k, token + rank * (Tokens / 2),
                                 slot.full());
        }
      }
      slot.advance();
    }
  }
}

// What the two thread blocks of a cluster have of the same tile, added: each has the sums of one half of the tokens
// then, in the first half of its own. The ring's memory is used for it, by all threads of both.
template <class S, int Blocks, int Sums>
__device__ __forceinline__ void add_halves(char* shared, float (&sums)[Blocks][Sums]) {
  constexpr int kQuads = S::kHalfSums / 4;
  const int rank = ptx::cluster_rank();
  auto* received = reinterpret_cast<float4*>(shared) + threadIdx.x;
  ptx::cluster_sync();
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const float* low = &sums[b][4 * i];
      const float* high = low + S::kHalfSums;
      ptx::store_shared(received + (b * kQuads + i) * (128 * S::kConsumers),
                        make_float4(rank ? low[0] : high[0], rank ? low[1] : high[1], rank ? low[2] : high[2],
                                    rank ? low[3] : high[3]),
                        rank ^ 1);
    }
  }
  ptx::cluster_sync();
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      const float4 v = received[(b * kQuads + i) * (128 * S::kConsumers)];
      const float of_other[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& sum = sums[b][4 * i + j];
        sum = (rank ? sums[b][S::kHalfSums + 4 * i + j] : sum) + of_other[j];
      }
    }
  }
}

// A warpgroup's part of a tile of the result: `chunks` times kChunk tokens from `token`. If not straight from the sums,
// through shared memory, which turns them around.
template <class S, class T, int Blocks, int Sums>
__device__ __forceinline__ void store_tile(const Product& p, const GemmSm90Walk::Tile& tile, int64_t token, int chunks,
                                           char* shared, float (&sums)[Blocks][Sums]) {
  const int warpgroup = static_cast<int>(threadIdx.x) / 128, warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  auto* buffer = reinterpret_cast<float*>(shared + S::kSums) + warpgroup * S::kSumFloats;
  if (stores_transposed<T>(p)) {
    const int64_t row = tile.row_block * int64_t{S::kRows} + warpgroup * (Blocks * 64) + warp * kTileN;
    auto* of_warp = reinterpret_cast<char*>(buffer) + warp * S::kSumFloats;
    store_transposed<T>(p, tile.batch, token, row, chunks * S::kChunk, of_warp, sums);
    return;
  }
  float* to = buffer + lane % 4 * 2 * S::kSumStride + warp * kTileN + lane / 4;
#pragma unroll 1
  for (int block = 0; block < Blocks; ++block) {
    const int64_t row = tile.row_block * int64_t{S::kRows} + (warpgroup * Blocks + block) * 64;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      ptx::sync_named(1 + warpgroup, 128);
#pragma unroll
      for (int b = 0; b < Blocks; ++b) {
#pragma unroll
        for (int c = 0; c < Sums / 16; ++c) {
          if (b != block || c != chunk) continue;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float* of = &sums[b][(c * 4 + j) * 4];
            to[j * 8 * S::kSumStride] = of[0];
            to[(j * 8 + 1) * S::kSumStride] = of[1];
            to[j * 8 * S::kSumStride + 8] = of[2];
            to[(j * 8 + 1) * S::kSumStride + 8] = of[3];
          }
        }
      }
      ptx::sync_named(1 + warpgroup, 128);
      store_block<S::kChunk, S::kSumStride>(p, tile.batch, token + chunk * S::kChunk, row, buffer);
    }
  }
}

// The sums of rows of tiles first_row, first_row + 4, ... of a weight, times the scales of their channels.
template <class F, int Blocks, int Sums>
__device__ __forceinline__ void scale_channels(const Weight& w, int weight_row, int first_row, int tile_rows,
                                               float (&sums)[Blocks][Sums]) {
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
    const int row = first_row + 4 * b < tile_rows ? first_row + 4 * b : tile_rows - 1;
    const AffinePair affine = F::affine(w, weight_row + row, static_cast<int>(threadIdx.x) % 32 / 4, 0);
#pragma unroll
    for (int i = 0; i < Sums; ++i) sums[b][i] *= affine.row[i / 2 % 2].scale;
  }
}

template <class F, class T, int Tokens, int Blocks, int Span>
__global__ void __cluster_dims__(2) __launch_bounds__(GemmSm90<F, Tokens, Blocks, Span>::kThreads, 1)
    gemm_sm90(const Product p, const GemmSm90Walk walk, const __grid_constant__ ProductMaps maps) {
  using S = GemmSm90<F, Tokens, Blocks, Span>;
  using Operand = ValueOperand<F, T>;
  // Uniform: behind branches that might diverge, ptxas would not keep the ring's state in uniform registers.
  const int warpgroup = ptx::uniform(static_cast<int>(threadIdx.x) / 128), rank = ptx::cluster_rank();
  auto* shared = static_cast<char*>(ptx::dynamic_shared());
  typename S::Slot slot = {shared};
  if (threadIdx.x == 0) {
    for (auto each = slot; each.parity == 0; each.advance()) {
      ptx::barrier_init(each.full(), 1);
      ptx::barrier_init(each.empty(), 2 * 4 * S::kConsumers);
    }
    ptx::barrier_init_fence();
  } else if (threadIdx.x == 128 * S::kConsumers) {
    ptx::prefetch_map(&maps.x);
    for_each_plane<F>(p.w, [&]<int I>() __attribute__((always_inline)) { ptx::prefetch_map(&maps.planes[I]); });
  }
  __syncthreads();
  ptx::cluster_arrive();
  ptx::cluster_wait();

  if (warpgroup == S::kConsumers) {
    ptx::lower_registers<S::kProducerRegisters>();
    if (ptx::uniform(static_cast<int>(threadIdx.x) / 32) % 4 == 0 && ptx::elect_one()) {
      bring_stages<F, Tokens, Blocks, Span>(p, walk, maps, slot);
    }
    __syncwarp();
    if (walk.ends_split(static_cast<int>(blockIdx.x) / 2, static_cast<int>(gridDim.x) / 2)) {  // see add_halves()
      ptx::cluster_sync();
      ptx::cluster_sync();
    }
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
      // Of the first tile, one warpgroup stores after the other. From then on they are apart by as much, so that one
      // has the tensor cores while the other stores.
      const bool first = item < static_cast<int>(gridDim.x) / 2 && item + static_cast<int>(gridDim.x) / 2 < walk.items;
      constexpr int kBarrier = 1 + S::kConsumers;  // of those that store_tile() does not use
      if (first && warpgroup == 1) ptx::sync_named(kBarrier, 128 * S::kConsumers);
      store_tile<S, T>(p, tile, token, Tokens / S::kChunk / (tile.split ? 2 : 1), shared, sums);
      if (first && warpgroup == 0) ptx::sync_named(kBarrier, 128 * S::kConsumers);
    }
  }
  // No block may end while the other can still write to it or arrive at its barriers.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace jax_qgemm
