// out = x @ w by wgmma for few rows of x, in f16 or bf16: the time to read the weights, where gemv's mma.sync would
// take longer.
//
// The product is computed transposed, w being the A operand in registers and x the B operand in shared memory. Extra
// warps have the copy engine bring both, some stages of k ahead and across tiles of rows without a pause: x for all,
// and for each warpgroup its own 64 rows of w. A warpgroup decodes the next k-steps while those before are multiplied.
// The warpgroups of a thread block, or of two in a cluster, divide rows and k; partial sums of k meet in the shared
// memory of the block that owns the tokens, while the next tile of rows is under way.
#pragma once

#include <utility>

#include "kernels/gemv_sm90_block.cuh"
#include "tile/store.cuh"
#include "tile/wgmma.cuh"

namespace jax_qgemm {

template <class F, class T, int Tokens, class G>
__global__ void __launch_bounds__(128 * (kGemvSm90Warpgroups + 1), 1)
    gemv_sm90(const Product p, const GemvSm90Sizes s, const PlaneBoxes boxes,
              const __grid_constant__ ProductMaps maps) {
  using S = GemvSm90<F, T, Tokens, G>;
  constexpr int kTiles = S::kTiles;
  const GemvSm90Config& c = s.config;
  Weight weight = with_grouping<F, G>(p.w);
  // Others are refused where scales are in the operand.
  if constexpr (!T::kIsBF16 && !S::kExact) weight.scale_type = ScaleType::kF16;
  // Opaque: the compiler would compute it, and what follows from it, again and again in the loop.
  const int lane = ptx::opaque(static_cast<int>(threadIdx.x) % 32);
  const int warp_of_block = ptx::uniform(static_cast<int>(threadIdx.x) / 32), warp = warp_of_block % 4;
  const int warpgroup = warp_of_block / 4, batch = static_cast<int>(blockIdx.y);
  auto* shared = static_cast<char*>(ptx::dynamic_shared());
  const S block(s, shared);
  const int slice = block.slice_of(warpgroup), row = warpgroup - slice * c.rows;

  constexpr int kStarted = 1 + kGemvSm90Warpgroups;  // a named barrier: there are barriers in shared memory
  const int threads = 128 * (c.warpgroups() + 1);
  if (warpgroup == c.warpgroups()) {
    ptx::lower_registers<S::kProducerRegisters>();
    const bool brings = warp < c.warpgroups() && ptx::elect_one();
    if (brings) block.start(warp);
    __syncwarp();
    if (c.cluster == 2) ptx::cluster_arrive();
    ptx::arrive_named(kStarted, threads);
    if (brings) {
      block.bring(weight, boxes, maps, warp, batch, static_cast<int>(p.stack.weight_of(batch)) * s.tile_rows);
    }
    __syncwarp();
    if (c.cluster == 2) ptx::cluster_wait();
    return;
  }
  ptx::raise_registers<S::kConsumerRegisters>();
  if (c.cluster == 2) ptx::cluster_arrive();
  ptx::sync_named(kStarted, threads);

  SlotTurn x(block.x(slice)), ring(block.weights(warpgroup));
  const PartialSums<Tokens> partial = block.partial(row);
  typename S::Staged staged(weight, warp, lane);
  staged.pin();
  typename S::Weights w;
  uint32_t a[2][S::kBatch][4];  // in use, and next
  const int first_stage = block.first_stage(slice);
  int stage_to_take = first_stage;
  // Stages, of all tiles.
  int to_take = (block.passes - (row + (block.passes - 1) * c.rows >= block.tiles)) * s.steps;
  const auto take_rest = [&]() __attribute__((always_inline)) {
    if constexpr (S::kSuper) w.load_codes(staged, ring.address(), 1);
    __syncwarp();
    ring.release(lane);
  };
  const auto take = [&]<int kStage>() __attribute__((always_inline)) {
    if (to_take > 0) ring.wait_full();  // behind the last stage, anything
    if constexpr (S::kSuper) {
      w.template load<kStage>(staged, ring.address(), lane);
      w.load_codes(staged, ring.address(), 0);
    } else {
      w.load(staged, ring.address(), stage_to_take);
    }
    if constexpr (!S::kTakesLate) take_rest();
    --to_take;
    if (++stage_to_take == first_stage + s.steps) stage_to_take = first_stage;
  };
  const auto release_x = [&]() __attribute__((always_inline)) {
    if (s.x_stays) {
      x.pass();
    } else {
      x.release(lane);
    }
  };
  const auto decode = [&](int batch) __attribute__((always_inline)) {
#pragma unroll
    for (int i = 0; i < S::kBatch; ++i) w.decode(a[batch % 2][i], weight, batch * S::kBatch + i);
  };

  // Sums of x over groups, of a unit, at its beginning and not between wgmmas: the warps that share x take turns.
  int turn = row * 4 + warp;
  const auto sum_x = [&](int pass) __attribute__((always_inline)) {
    if constexpr (S::kSumsX) {
      if (pass > 0 && s.x_stays) return;
      constexpr int kTasks = S::kStages * (Tokens / 16);
#pragma unroll 1
      for (; turn < kTasks; turn += 4 * c.rows) {
        SlotTurn of_task = x;
        if (turn >= Tokens / 16) of_task.advance();
        of_task.wait_full();
        S::XSums::sum(block.x_sums(slice, of_task.index()), of_task.address(), S::kXTileBytes, turn % (Tokens / 16) * 2,
                      lane);
        ptx::barrier_arrive(block.x_summed(slice) + of_task.index());
      }
      turn -= kTasks;
    }
  };
  // Minimums, at the end of a unit. Until then its stages of x are kept, and with them the slots of their sums.
  ptx::SharedAddress x_sums[S::kStages], x_full[S::kStages];
  const auto keep_x = [&](int stage) __attribute__((always_inline)) {
    if constexpr (S::kSumsX) {
      x_full[stage] = x.full();
      x_sums[stage] = block.x_sums(slice, x.index()) + lane * 4;
      ptx::barrier_wait(block.x_summed(slice) + x.index(), x.phase());
      if (s.x_stays) {
        x.pass();
      } else {
        x.advance();
      }
    }
  };
  const auto add_minimums = [&](float (&sums)[Tokens / 2]) __attribute__((always_inline)) {
    if constexpr (S::kSumsX) {
      using XSums = typename S::XSums;
      uint32_t minimums[4];
      w.minimum_operand(minimums);
      const float scale[2] = {w.minimum(0) * XSums::kUp, w.minimum(1) * XSums::kUp};
#pragma unroll
      for (int i = 0; i < Tokens / 8; ++i) {
        float product[4] = {};
        XSums::multiply(product, minimums, x_sums[0] + i * XSums::kTileBytes, x_sums[1] + i * XSums::kTileBytes);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[4 * i + j] = fmaf(product[j], scale[j / 2], sums[4 * i + j]);
      }
    }
  };

  take.template operator()<0>();
  decode(0);
  const bool plain = p.epilogue.empty();
  const int lag = c.buffers - 1;  // passes between a tile's last product and its results
#pragma unroll 1
  for (int pass = 0; pass < block.passes + lag; ++pass) {
    const int tile = row + pass * c.rows;
    if (pass < block.passes && tile < block.tiles) {
      float sums[Tokens / 2] = {};
#pragma unroll 1
      for (int step = 0; step < s.steps; step += S::kStages) {
        if constexpr (S::kSumsX) sum_x(pass);
        float of_span[Tokens / 2];
        uint64_t x_operand;
        // Between the first wgmma and the last wait there must be no branch but to wait, or ptxas runs them one by one.
        const auto multiply = [&]<int kFirst>() __attribute__((always_inline)) {
          ptx::wgmma_fence();
#pragma unroll
          for (int i = 0; i < S::kBatch; ++i) {
            const int at = kFirst % (4 * kTiles) + i;
            const uint64_t b = operand_of_step(x_operand, at / 4 * (S::kXTileBytes / 32) + at % 4);
            auto& operand = a[kFirst / S::kBatch % 2][i];
            if constexpr (!S::kScalesSums) {
              wgmma<T>(sums, operand, b);
            } else if (kFirst % S::kSpan == 0 && i == 0) {
              wgmma<T, false>(of_span, operand, b);
            } else {
              wgmma<T>(of_span, operand, b);
            }
          }
          ptx::wgmma_commit();
        };
        const auto run = [&]<int kIndex>() __attribute__((always_inline)) {
          constexpr int kEnd = (kIndex + 1) * S::kBatch;  // k-steps
          constexpr bool kStarts = kIndex % S::kBatches == 0, kEndsStage = kEnd % (4 * kTiles) == 0;
          constexpr bool kLast = kEnd == S::kSteps, kEndsSpan = kLast || kEnd % S::kSpan == 0;
          if constexpr (kStarts) {
            x_operand = uniform_operand(x.address());
            x.wait_full();
          }
          multiply.template operator()<kIndex * S::kBatch>();
          float scale[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) scale[h] = w.scale(h, kEnd - 1);
          ptx::wgmma_wait_but<1>();
          if constexpr (kEndsStage && S::kSumsX) keep_x(kIndex / S::kBatches);
          if constexpr (kLast && S::kSumsX && !S::kTakesLate) add_minimums(sums);
          if constexpr (kEndsStage) take.template operator()<kLast ? 0 : 1>();
          if constexpr (S::kTakesLate && (kIndex + 1) % S::kBatches == S::kBatches / 2) take_rest();
          decode((kIndex + 1) % S::kBatches);
          if constexpr (S::kScalesSums && kEndsSpan) {
            ptx::wgmma_wait(of_span);
#pragma unroll
            for (int i = 0; i < Tokens / 2; ++i) sums[i] = fmaf(of_span[i], scale[i / 2 % 2], sums[i]);
          } else if constexpr (kEndsStage && !S::kSumsX) {
            if constexpr (S::kScalesSums) {
              ptx::wgmma_wait(of_span);
            } else {
              ptx::wgmma_wait(sums);
            }
          }
          if constexpr (kEndsStage && !S::kSumsX) release_x();
          if constexpr (kLast && S::kSumsX) {
            if constexpr (S::kTakesLate) add_minimums(sums);
            __syncwarp();
            for (const auto& full : x_full) ptx::barrier_arrive_if(lane == 0 && !s.x_stays, full + 8);
          }
        };
        [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) __attribute__((always_inline)) {
          (run.template operator()<kIndex>(), ...);
        }(std::make_integer_sequence<int, S::kSteps / S::kBatch>());
      }
      if (c.cluster == 2 && pass == 0) ptx::cluster_wait();  // the other block's barriers are there
      partial.send(sums, slice, pass);
    } else if (pass < block.passes) {
      // A last pass in which this warpgroup has no rows: the ring of x goes on.
      for (int step = 0; step < s.steps; ++step) {
        if constexpr (S::kSumsX) {
          if (step % S::kStages == 0) sum_x(pass);
        }
        x.wait_full();
        release_x();
      }
      if (c.cluster == 2 && pass == 0) ptx::cluster_wait();
    }

    // Results of the pass before, or of this one.
    const int done = pass - lag, done_tile = tile - lag * c.rows;
    if (done < 0 || done_tile >= block.tiles) continue;
    const int reader = (slice + done) % c.slices;
    if (reader >= partial.readers()) continue;
    auto* scratch = reinterpret_cast<float*>(shared + s.scratch) + warpgroup * GemvSm90Sizes::kScratchFloats;
    constexpr int kStride = GemvSm90Sizes::kScratchFloats / 8;
    const int64_t column = (block.first_tile + done_tile) * int64_t{kGemvSm90Rows};
    partial.wait(done);
    for (int i = reader; i < partial.token_tiles(); i += c.slices) {
      const int token = (block.rank * partial.token_tiles() + i) * 8;
      if (token >= s.tokens) break;
      const float4 sum = partial.sum(done, i);
      if (plain) {
        store_fragment(p, batch, token + lane % 4 * 2, column + warp * kTileN + lane / 4, sum);
        continue;
      }
      float* to = scratch + lane % 4 * 2 * kStride + warp * kTileN + lane / 4;
      to[0] = sum.x;
      to[kStride] = sum.y;
      to[8] = sum.z;
      to[kStride + 8] = sum.w;
      ptx::sync_named(1 + warpgroup, 128);
      store_block<8, kStride>(p, batch, token, column, scratch);
      ptx::sync_named(1 + warpgroup, 128);
    }
    if (done_tile + c.buffers * c.rows < block.tiles) partial.release(done);
  }
}

}  // namespace jax_qgemm
