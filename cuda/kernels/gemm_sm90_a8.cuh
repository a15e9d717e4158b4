// out = x_scale * (x @ w) by wgmma, for x in codes of 8 bits with one scale per row, and weights of 4 or 8 bits.
//
// Otherwise like gemm_sm90: pairs of thread blocks, a ring of stages, the product transposed with w in registers. Codes
// are multiplied with codes. One scale per channel: a sum of int8 codes runs over all of k, and is exact. Otherwise it
// ends with each group of k, and its scale times it is added to a sum in float32, by one warpgroup while the other one
// has the tensor cores. So it is, every 128 of k, with float8 codes, of whose sums Hopper keeps few bits.
#pragma once

#include "kernels/gemm_sm90_tiles.cuh"
#include "tile/code_operand.cuh"

namespace jax_qgemm {

// X: Int8Codes or Fp8Codes. Blocks: of 64 rows of n, a warpgroup. Group: elements of k whose sum is exact, 64 or 128; 0
// is all of k. Channel: the weight has one scale per channel.
template <class F, class X, int Tokens, int Blocks, int Group, bool Channel>
struct GemmSm90A8Stage {
  static constexpr int kTiles = 2;  // of 64 k: 128 bytes of x
  static constexpr bool kCodesAlone = Channel;
  using Staged = StagedWeight<F, kTiles, 4, 8 * Blocks>;
};

template <class F, class X, int Tokens, int Blocks, int Group, bool Channel,
          class Stage = GemmSm90A8Stage<F, X, Tokens, Blocks, Group, Channel>>
struct GemmSm90A8 : Stage,
                    GemmSm90Tiles<Tokens, Blocks, 1, 1, Channel ? Stage::Staged::first(1) : Stage::Staged::kBytes> {
  static constexpr int kInFlight = 1;
};

// The scales of the rows of x belong to columns of the sums: 8j + 2t and 8j + 2t + 1 of lane 4g + t.
template <class X, int Blocks, int Sums>
__device__ __forceinline__ void scale_tokens(const Product& p, int64_t batch, int64_t token,
                                             float (&sums)[Blocks][Sums]) {
  const int64_t first = token + threadIdx.x % 4 * 2;
  const float* scales = p.x_scales + batch * p.m + first;
  const int64_t left = p.m - first;
#pragma unroll
  for (int j = 0; j < Sums / 4; ++j) {
    const float scale[2] = {8 * j < left ? scales[8 * j] : 0.0f, 8 * j + 1 < left ? scales[8 * j + 1] : 0.0f};
#pragma unroll
    for (int b = 0; b < Blocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[b][4 * j + i] *= scale[i % 2] * X::kUnit;
    }
  }
}

template <class F, class X, int Tokens, int Blocks, int Group, bool Channel>
__global__ void __cluster_dims__(2) __launch_bounds__(GemmSm90A8<F, X, Tokens, Blocks, Group, Channel>::kThreads, 1)
    gemm_sm90_a8(const Product p, const GemmSm90Walk walk, const __grid_constant__ ProductMaps maps) {
  using S = GemmSm90A8<F, X, Tokens, Blocks, Group, Channel>;
  using Staged = typename S::Staged;
  constexpr bool kGrouped = Group != 0;
  static_assert(kGrouped || Channel);
  constexpr int kSums = Tokens / 2, kSteps = 4 * Blocks, kBuffers = 4;
  static_assert(!kGrouped || Blocks == 1);

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
    const uint32_t selector = PairedCodes<F::kLowBits>::selector(lane);

    // A stage is kSteps steps, of 32 k for each block of rows in turn.
    PairedCodes<F::kLowBits> codes[Blocks];
    Staged staged[Blocks];
    typename Staged::Tile values[Blocks];
    uint32_t a[kBuffers][4], zeros[Blocks][2];
#pragma unroll
    for (int b = 0; b < Blocks; ++b) staged[b] = Staged(p.w, row + 4 * b, lane);
    const auto read = [&](int b, typename S::Slot from, int tile) __attribute__((always_inline)) {
      constexpr int kTileBytes = 128 * F::kLowBits;
      codes[b].load(from.w() + ((row + 4 * b) * S::kTiles + tile) * kTileBytes, lane);
      if constexpr (!Channel) {
        if (tile * 64 % Group == 0) staged[b].load_affine(values[b], from.w(), tile);
      }
    };
    const auto take_zeros = [&](int b, const AffinePair& affine) __attribute__((always_inline)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) zeros[b][h] = static_cast<uint32_t>(affine.row[h].zero) * 0x01010101u;
    };
    const auto decode = [&](int step) __attribute__((always_inline)) {
      decode_codes<X>(a[step % kBuffers], codes[step % Blocks], step / Blocks % 2, zeros[step % Blocks], selector);
    };

    for (int item = static_cast<int>(blockIdx.x) / 2; item < walk.items; item += static_cast<int>(gridDim.x) / 2) {
      const GemmSm90Walk::Tile tile = walk.tile(item, rank);
      if (walk.skipped(tile)) continue;
      const int weight_row = static_cast<int>(p.stack.weight_of(tile.batch)) * walk.tile_rows;
      const int first_row = tile.row_block * S::kRowTiles + row;
      float sums[Blocks][kSums] = {};
      if constexpr (Channel) {
        const bool has_zeros = p.w.has_plane(F::kScales + 1);
#pragma unroll
        for (int b = 0; b < Blocks; ++b) {
          AffinePair affine = {{{1.0f, F::kZero, 0.0f}, {1.0f, F::kZero, 0.0f}}};
          if (has_zeros) affine = channel_affine<F>(p.w, weight_row, first_row + 4 * b, walk.tile_rows);
          take_zeros(b, affine);
        }
      }
      // A slot is free when both blocks have read it; of a split k, where the other has its own, by two arrivals here.
      const ptx::ClusterAddress empty =
          ptx::cluster_address(typename S::Slot{shared}.empty(), tile.split ? rank : lane % 2);
      const auto release = [&](int index, bool on) __attribute__((always_inline)) {
        __syncwarp();
        ptx::barrier_arrive_if(on && lane < 2, empty, index);
      };
      ptx::barrier_wait(slot.full(), slot.parity);
#pragma unroll
      for (int b = 0; b < Blocks; ++b) read(b, slot, 0);
      if constexpr (kGrouped) {
        // The wgmmas of a group are issued at once, in two parts of the tokens: while the second part runs, the first
        // one is added to the sums. While the second one is and the next operands are made, the other warpgroup's run.
        constexpr int kGroupSteps = Group / 32, kGroups = 4 / kGroupSteps;
        constexpr int kParts = Tokens == 64 ? 1 : 2, kPartSums = kSums / kParts;
        typename X::Sum exact[kParts][kPartSums];
        const auto affine_of_group = [&]() __attribute__((always_inline)) {
          if constexpr (!Channel) return values[0].affine(p.w, 0);
          return AffinePair{{{1.0f, F::kZero, 0.0f}, {1.0f, F::kZero, 0.0f}}};
        };
        AffinePair affine;
        const auto prepare = [&](typename S::Slot from) __attribute__((always_inline)) {
          if constexpr (!Channel) take_zeros(0, affine_of_group());
#pragma unroll
          for (int step = 0; step < kGroupSteps; ++step) {
            if (step == 2) read(0, from, 1);
            decode(step);
          }
        };
        const auto add = [&](int part) __attribute__((always_inline)) {
#pragma unroll
          for (int i = 0; i < kPartSums; ++i) {
            ptx::pin(exact[part][i]);
            float& sum = sums[0][part * kPartSums + i];
            sum = fmaf(static_cast<float>(exact[part][i]), affine.row[i / 2 % 2].scale, sum);
          }
        };
        prepare(slot);
        for (int stage = tile.first_stage; stage < tile.last_stage; ++stage) {
          const typename S::Slot now = slot;
          slot.advance();
          const uint64_t x = swizzled_operand(now.x(0));
#pragma unroll
          for (int group = 0; group < kGroups; ++group) {
            const bool last = group == kGroups - 1;
            affine = affine_of_group();
#pragma unroll
            for (int step = 0; step < kGroupSteps; ++step) ptx::pin(a[step]);  // nothing comes between the wgmmas
            ptx::wgmma_fence();
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
              const uint64_t of_part = x + part * (Tokens / kParts * 128 >> 4);
              wgmma8<X, false>(exact[part], a[0], operand_of_step(of_part, group * kGroupSteps));
#pragma unroll
              for (int step = 1; step < kGroupSteps; ++step) {
                wgmma8<X>(exact[part], a[step], operand_of_step(of_part, group * kGroupSteps + step));
              }
              ptx::wgmma_commit();
            }
            if constexpr (kParts == 2) {
              ptx::wgmma_wait_but<1>();
              add(0);
            }
            if (!last) {
              read(0, now, group + 1);
            } else {
              // Behind the last stage, anything.
              if (stage + 1 < tile.last_stage) ptx::barrier_wait(slot.full(), slot.parity);
              read(0, slot, 0);
            }
            ptx::wgmma_wait_but<0>();
            if (last) release(now.index, true);
            prepare(last ? slot : now);
            add(kParts - 1);
          }
        }
      } else {
        // While wgmmas run, the operand of the next step is made, out of the codes of a tile of 64 k. When the last one
        // of a tile is made, the next tile is read.
        int exact[Blocks][kSums] = {};
        int before = 0;
        decode(0);
        for (int stage = tile.first_stage; stage < tile.last_stage; ++stage) {
          const typename S::Slot now = slot;
          slot.advance();
          const uint64_t x = swizzled_operand(now.x(0));
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            ptx::wgmma_fence();
            wgmma8<X>(exact[step % Blocks], a[step % kBuffers], operand_of_step(x, step / Blocks));
            ptx::wgmma_commit();
            ptx::wgmma_wait_but<S::kInFlight>();
            if (step == S::kInFlight - 1) release(before, stage != tile.first_stage);

            const int next = (step + 1) % kSteps, of = next % Blocks, next_tile = next / Blocks / 2 + 1;
            decode(next);
            if (next / Blocks % 2 == 1) {
              if (next_tile < S::kTiles) {
                read(of, now, next_tile);
              } else {
                // Behind the last stage, anything.
                if (of == 0 && stage + 1 < tile.last_stage) ptx::barrier_wait(slot.full(), slot.parity);
                read(of, slot, 0);
              }
            }
          }
          before = now.index;
        }
#pragma unroll
        for (int b = 0; b < Blocks; ++b) {
          ptx::wgmma_wait(exact[b]);
#pragma unroll
          for (int i = 0; i < kSums; ++i) sums[b][i] = static_cast<float>(exact[b][i]);
        }
        release(before, true);
      }

      if constexpr (Channel) scale_channels<F>(p.w, weight_row, first_row, walk.tile_rows, sums);
      int64_t token = tile.token_block * int64_t{Tokens};
      if (tile.split) {
        add_halves<S>(shared, sums);
        token += rank * (Tokens / 2);
      }
      scale_tokens<X>(p, tile.batch, token, sums);
      store_item<S, MmaBF16, MmaF16>(p, walk, item, warpgroup, tile, token, shared, sums);
    }
  }
  // No block may end while the other can still write to it or arrive at its barriers.
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

}  // namespace jax_qgemm
