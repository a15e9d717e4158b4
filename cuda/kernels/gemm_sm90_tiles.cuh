// What gemm_sm90 and gemm_sm90_a8 share: pairs of thread blocks that compute tiles of 128 or 256 rows of n by Tokens
// rows of x, one after the other, by two warpgroups out of a ring of slots that one warp fills, and store them.
#pragma once

#include <cuda.h>

#include "kernels/gemm_sm90_walk.h"
#include "tile/store.cuh"
#include "tile/store_transposed.cuh"
#include "tile/wgmma.cuh"

namespace jax_qgemm {

// Blocks: of 64 rows of n, a warpgroup. Boxes: of 128 bytes of k of x, a stage. ElementBytes: of x. WeightBytes: a
// stage.
template <int Tokens_, int Blocks, int Boxes, int ElementBytes, int WeightBytes>
struct GemmSm90Tiles {
  static constexpr int kTokens = Tokens_;
  static constexpr int kConsumers = 2;  // warpgroups
  static constexpr int kRowTiles = 4 * Blocks * kConsumers, kRows = kRowTiles * kTileN;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (65536 / kThreads & ~7) * (kConsumers + 1));

  // Shared memory, beginning with the ring. A slot holds x as boxes of [token][128 bytes], and then w.
  static constexpr int kXBoxes = Boxes, kBoxBytes = kTokens * 128, kXBytes = Boxes * kBoxBytes;
  static constexpr int kBoxColumns = 128 / ElementBytes, kStageK = Boxes * kBoxColumns;
  static constexpr int kSlotBytes = (kXBytes + WeightBytes + 1023) / 1024 * 1024;
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
  static constexpr int kHalfSums = kTokens / 4;
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
    __device__ __forceinline__ ptx::SharedAddress x(int box) const {
      return ptx::shared_address(shared) + (index * kSlotBytes + box * kBoxBytes);
    }
    __device__ __forceinline__ ptx::SharedAddress w() const { return x(kXBoxes); }
    __device__ __forceinline__ void advance() {
      if (++index == kSlots) index = 0, parity ^= 1;
    }
  };
};

// The weight with those of its planes that are brought.
template <class S>
QG_HD Weight brought(Weight w) {
  if constexpr (S::kCodesAlone) {
    for (int i = 1; i < kMaxPlanes; ++i) w.planes[i] = nullptr;
  }
  return w;
}

// A thread block's beginning; the barriers of the ring stand then.
template <class F, class S>
__device__ __forceinline__ void start_ring(const Weight& w, const ProductMaps& maps, typename S::Slot slot) {
  if (threadIdx.x == 0) {
    for (; slot.parity == 0; slot.advance()) {
      ptx::barrier_init(slot.full(), 1);
      ptx::barrier_init(slot.empty(), 2 * 4 * S::kConsumers);
    }
    ptx::barrier_init_fence();
  } else if (threadIdx.x == 128 * S::kConsumers) {
    ptx::prefetch_map(&maps.x);
    for_each_plane<F>(brought<S>(w),
                      [&]<int I>() __attribute__((always_inline)) { ptx::prefetch_map(&maps.planes[I]); });
  }
  __syncthreads();
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// One thread's work: x and w of all items of the block into the ring.
template <class F, class S>
__device__ __forceinline__ void bring_stages(const Product& p, const GemmSm90Walk& walk, const ProductMaps& maps,
                                             typename S::Slot slot) {
  constexpr int kHalf = S::kTokens / 2;
  const int rank = ptx::cluster_rank();
#pragma unroll 1
  for (int item = static_cast<int>(blockIdx.x) / 2; item < walk.items; item += static_cast<int>(gridDim.x) / 2) {
    const GemmSm90Walk::Tile tile = walk.tile(item, rank);
    if (walk.skipped(tile)) continue;
    const int token = tile.batch * static_cast<int>(p.m) + tile.token_block * S::kTokens;
    const int first_row = static_cast<int>(p.stack.weight_of(tile.batch)) * walk.tile_rows;  // of the weight
    const int tile_row = first_row + tile.row_block * S::kRowTiles;
#pragma unroll 1
    for (int stage = tile.first_stage; stage < tile.last_stage; ++stage) {
      ptx::barrier_wait(slot.empty(), slot.parity ^ 1);
      ptx::barrier_expect(slot.full(), S::kXBytes + walk.boxes.bytes);
      load_planes<F, typename S::Staged>(brought<S>(p.w), walk.boxes, maps.planes, slot.w(), stage, tile_row,
                                         slot.full());
#pragma unroll
      for (int i = 0; i < S::kXBoxes; ++i) {
        const int k = (stage * S::kXBoxes + i) * S::kBoxColumns;
        if (tile.split) {
          ptx::load_box(slot.x(i), &maps.x, k, token, slot.full());
          ptx::load_box(slot.x(i) + S::kBoxBytes / 2, &maps.x, k, token + kHalf, slot.full());
        } else {
          ptx::load_box_for_both(slot.x(i) + rank * (S::kBoxBytes / 2), &maps.x, k, token + rank * kHalf, slot.full());
        }
      }
      slot.advance();
    }
  }
}

// The work of the warpgroup that does not multiply.
template <class F, class S>
__device__ __forceinline__ void fill_ring(const Product& p, const GemmSm90Walk& walk, const ProductMaps& maps,
                                          typename S::Slot slot) {
  ptx::lower_registers<S::kProducerRegisters>();
  if (ptx::uniform(static_cast<int>(threadIdx.x) / 32) % 4 == 0 && ptx::elect_one()) {
    bring_stages<F, S>(p, walk, maps, slot);
  }
  __syncwarp();
  if (walk.ends_split(static_cast<int>(blockIdx.x) / 2, static_cast<int>(gridDim.x) / 2)) {  // see add_halves()
    ptx::cluster_sync();
    ptx::cluster_sync();
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
// which is for elements of the types T, through shared memory, which turns them around.
template <class S, class... T, int Blocks, int Sums>
__device__ __forceinline__ void store_tile(const Product& p, const GemmSm90Walk::Tile& tile, int64_t token, int chunks,
                                           char* shared, float (&sums)[Blocks][Sums]) {
  const int warpgroup = static_cast<int>(threadIdx.x) / 128, warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  auto* buffer = reinterpret_cast<float*>(shared + S::kSums) + warpgroup * S::kSumFloats;
  const auto stored = [&]<class To>(std::type_identity<To>) __attribute__((always_inline)) {
    if (!stores_transposed<To>(p)) return false;
    const int64_t row = tile.row_block * int64_t{S::kRows} + warpgroup * (Blocks * 64) + warp * kTileN;
    auto* of_warp = reinterpret_cast<char*>(buffer) + warp * S::kSumFloats;
    store_transposed<To>(p, tile.batch, token, row, chunks * S::kChunk, of_warp, sums);
    return true;
  };
  if ((stored(std::type_identity<T>{}) || ...)) return;
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

// Of the lane's two channels in row of tiles `row` of a weight; behind its rows, of the last.
template <class F>
__device__ __forceinline__ AffinePair channel_affine(const Weight& w, int weight_row, int row, int tile_rows) {
  return F::affine(w, weight_row + (row < tile_rows ? row : tile_rows - 1), static_cast<int>(threadIdx.x) % 32 / 4, 0);
}

// store_tile() of an item. Of the block's first tile, one warpgroup stores after the other. From then on they are apart
// by as much, so that one has the tensor cores while the other stores.
template <class S, class... T, int Blocks, int Sums>
__device__ __forceinline__ void store_item(const Product& p, const GemmSm90Walk& walk, int item, int warpgroup,
                                           const GemmSm90Walk::Tile& tile, int64_t token, char* shared,
                                           float (&sums)[Blocks][Sums]) {
  constexpr int kBarrier = 1 + S::kConsumers;  // of those that store_tile() does not use
  const bool first = item < static_cast<int>(gridDim.x) / 2 && item + static_cast<int>(gridDim.x) / 2 < walk.items;
  if (first && warpgroup == 1) ptx::sync_named(kBarrier, 128 * S::kConsumers);
  store_tile<S, T...>(p, tile, token, S::kTokens / S::kChunk / (tile.split ? 2 : 1), shared, sums);
  if (first && warpgroup == 0) ptx::sync_named(kBarrier, 128 * S::kConsumers);
}

// The sums of rows of tiles first_row, first_row + 4, ... of a weight, times the scales of their channels.
template <class F, int Blocks, int Sums>
__device__ __forceinline__ void scale_channels(const Weight& w, int weight_row, int first_row, int tile_rows,
                                               float (&sums)[Blocks][Sums]) {
#pragma unroll
  for (int b = 0; b < Blocks; ++b) {
    const AffinePair affine = channel_affine<F>(w, weight_row, first_row + 4 * b, tile_rows);
#pragma unroll
    for (int i = 0; i < Sums; ++i) sums[b][i] *= affine.row[i / 2 % 2].scale;
  }
}

}  // namespace jax_qgemm
