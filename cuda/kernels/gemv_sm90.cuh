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

#include "kernels/gemv_sm90_config.cuh"
#include "tile/partial_sums.cuh"
#include "tile/plane_boxes.cuh"
#include "tile/slot_ring.cuh"
#include "tile/stage_copier.cuh"
#include "tile/store.cuh"
#include "tile/value_operand.cuh"
#include "tile/wgmma.cuh"

namespace jax_qgemm {

// Whether the operand is the integer or the 4-bit float itself, and sums are multiplied by the scale: of integer
// formats, where a scale serves whole tiles, weights are not rounded then; and where float16 does not hold the scales.
template <class F, class T, class G>
constexpr bool kGemvSm90Exact = F::kGroup == 0 ? G::kSteps >= 4 : !T::kIsBF16 && !kScalesFitF16<F>;

template <class F, class G>
using GemvSm90Staged = StagedWeight<F, kGemvSm90Stage / kTileK, std::min(G::kSteps, 4), kGemvSm90Rows / kTileN>;

template <class F, class T, int Tokens, class G>
struct GemvSm90 {
  using Staged = GemvSm90Staged<F, G>;
  static constexpr int kTiles = kGemvSm90Stage / kTileK;
  // A slot of x holds [tile of k][token][64].
  static constexpr int kXTileBytes = Tokens * kTileK * 2, kXBytes = kTiles * kXTileBytes;
  static constexpr bool kExact = kGemvSm90Exact<F, T, G>;
  // k-steps whose operands are made at a time, and how many times that is of a stage. Registers are few.
  static constexpr int kBatch = Tokens == 64 || (kExact && G::kSteps == 2) ? 2 : 4, kBatches = kTiles * 4 / kBatch;
  using Operand = ValueOperand<F, T, kExact>;
  // Of the 96 that a thread begins with, so that a block of all warpgroups is full.
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 112;
  static_assert(kProducerRegisters + kGemvSm90Warpgroups * kConsumerRegisters <= (kGemvSm90Warpgroups + 1) * 96);

  const GemvSm90Sizes& s;
  char* shared;
  int rank, first_tile, tiles, passes;  // rank: in the cluster; the tiles of 64 rows of this cluster

  __device__ __forceinline__ GemvSm90(const GemvSm90Sizes& s, char* shared)
      : s(s), shared(shared), rank(s.config.cluster == 2 ? ptx::cluster_rank() : 0) {
    const int cluster = static_cast<int>(blockIdx.x) >> (s.config.cluster - 1);
    first_tile = s.first_tile(cluster);
    tiles = s.tiles(cluster);
    passes = cluster < s.more_tiles ? s.passes : s.passes_without_more;
  }

  __device__ __forceinline__ uint64_t* barriers() const { return reinterpret_cast<uint64_t*>(shared + s.barriers); }
  __device__ __forceinline__ int slice_of(int warpgroup) const { return s.slice_of >> 4 * warpgroup & 15; }
  __device__ __forceinline__ int first_stage(int slice) const { return (rank * s.config.slices + slice) * s.steps; }
  // Of a slice; where they are as many as its stages x stays, for all passes over k.
  __device__ __forceinline__ Slots x(int slice) const {
    const int count = s.config.slots;
    return {barriers() + 2 * slice * count, shared + s.x + slice * count * kXBytes, count, kXBytes};
  }
  // Of a warpgroup.
  __device__ __forceinline__ Slots weights(int warpgroup) const {
    const GemvSm90Config& c = s.config;
    return {barriers() + 2 * (c.slices * c.slots + warpgroup * c.depth),
            shared + s.rings + warpgroup * c.depth * s.stage_bytes, c.depth, s.stage_bytes};
  }
  __device__ __forceinline__ PartialSums<Tokens> partial(int row) const {
    const GemvSm90Config& c = s.config;
    uint64_t* of_sums = barriers() + 2 * (c.slices * c.slots + c.warpgroups() * c.depth);
    return {reinterpret_cast<float4*>(shared + s.parts) + row * c.buffers * c.slices * Tokens * 16,
            of_sums + row * c.buffers,
            of_sums + (c.rows + row) * c.buffers,
            c.slices,
            c.cluster,
            rank,
            c.buffers};
  }

  // By one thread of a producer warp, here and below: it brings the weights of the warpgroup of the same number, and x
  // for the slice of the same number. (Consumers elect no thread: ptxas would take what they do then for divergent.)
  __device__ __forceinline__ void start(int producer) const {
    const GemvSm90Config& c = s.config;
    if (producer < c.slices) x(producer).start(4 * c.rows);
    if (producer < c.rows) partial(producer).start();
    weights(producer).start(4);
    ptx::barrier_init_fence();
  }

  // weight_row: the weight's first row of tiles.
  __device__ __forceinline__ void bring(const Weight& weight, const PlaneBoxes& boxes, const ProductMaps& maps,
                                        int producer, int batch, int weight_row) const {
    const GemvSm90Config& c = s.config;
    SlotTurn x_turn(x(producer)), w_turn(weights(producer));
    const int slice = slice_of(producer);
    int tile = producer - slice * c.rows;
    bool brings_x = producer < c.slices;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
#pragma unroll 1
      for (int step = 0; step < s.steps; ++step) {
        if (brings_x) {
          if (!s.x_stays) x_turn.wait_read();
          ptx::barrier_expect(x_turn.full(), s.tokens * kGemvSm90Stage * 2);
          const int k = (first_stage(producer) + step) * kGemvSm90Stage;
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            ptx::load_box(x_turn.address() + i * kXTileBytes, &maps.x, k + i * kTileK, batch * s.tokens, x_turn.full());
          }
          x_turn.advance();
        }
        if (tile < tiles) {
          w_turn.wait_read();
          ptx::barrier_expect(w_turn.full(), boxes.bytes);
          load_planes<F, Staged>(weight, boxes, maps.planes, w_turn.address(), first_stage(slice) + step,
                                 weight_row + (first_tile + tile) * 4, w_turn.full());
          w_turn.advance();
        }
      }
      tile += c.rows;
      if (s.x_stays) brings_x = false;
    }
  }
};

template <class F, class T, int Tokens, class G>
__global__ void __launch_bounds__(128 * (kGemvSm90Warpgroups + 1), 1)
    gemv_sm90(const Product p, const GemvSm90Sizes s, const PlaneBoxes boxes,
              const __grid_constant__ ProductMaps maps) {
  using S = GemvSm90<F, T, Tokens, G>;
  using Operand = typename S::Operand;
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
  typename S::Staged::Tile w[kTiles];
  typename Operand::Group group;
  uint32_t a[2][S::kBatch][4];                                  // in use, and next
  constexpr int kGroups = std::max(kTiles * 4 / G::kSteps, 1);  // of a stage
  float scales[kGroups][2];
  const int first_stage = block.first_stage(slice);
  int stage_to_take = first_stage;
  // Stages, of all tiles.
  int to_take = (block.passes - (row + (block.passes - 1) * c.rows >= block.tiles)) * s.steps;
  const auto take = [&]() __attribute__((always_inline)) {
    if (to_take > 0) ring.wait_full();  // behind the last stage, anything
#pragma unroll
    for (int i = 0; i < kTiles; ++i) staged.load(w[i], ring.address(), i, stage_to_take * kTiles + i);
    __syncwarp();
    ring.release(lane);
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
    for (int i = 0; i < S::kBatch; ++i) {
      const int at = batch * S::kBatch + i, tile = at / 4, step = at % 4;
      if (at % G::kSteps == 0) {
        const AffinePair affine = w[tile].affine(weight, step);
        group = Operand::prepare(affine);
#pragma unroll
        for (int h = 0; h < 2; ++h) scales[at / G::kSteps][h] = affine.row[h].scale * Operand::unit(h);
      }
      Operand::decode(a[batch % 2][i], w[tile].codes, step, group);
    }
  };

  take();
  decode(0);
  const bool plain = p.epilogue.empty();
  const int lag = c.buffers - 1;  // passes between a tile's last product and its results
#pragma unroll 1
  for (int pass = 0; pass < block.passes + lag; ++pass) {
    const int tile = row + pass * c.rows;
    if (pass < block.passes && tile < block.tiles) {
      float sums[Tokens / 2] = {}, of_group[Tokens / 2] = {};
#pragma unroll 1
      for (int step = 0; step < s.steps; ++step) {
        const uint64_t x_operand = uniform_operand(x.address());
        // Between the first wgmma and the last wait there must be no branch but to wait, or ptxas runs them one by one.
        const auto multiply = [&]<int kFirst>() __attribute__((always_inline)) {
          ptx::wgmma_fence();
#pragma unroll
          for (int i = 0; i < S::kBatch; ++i) {
            const uint64_t b = operand_of_step(x_operand, (kFirst + i) / 4 * (S::kXTileBytes / 32) + (kFirst + i) % 4);
            auto& operand = a[kFirst / S::kBatch % 2][i];
            if constexpr (!S::kExact) {
              wgmma<T>(sums, operand, b);
            } else if (kFirst % G::kSteps == 0 && i == 0) {
              wgmma<T, false>(of_group, operand, b);
            } else {
              wgmma<T>(of_group, operand, b);
            }
          }
          ptx::wgmma_commit();
        };
        const auto run = [&]<int kIndex>() __attribute__((always_inline)) {
          constexpr int kEnd = (kIndex + 1) * S::kBatch;  // k-steps
          constexpr bool kLast = kIndex + 1 == S::kBatches, kEndsGroup = kLast || kEnd % G::kSteps == 0;
          multiply.template operator()<kIndex * S::kBatch>();
          const auto& scale = scales[(kEnd - 1) / G::kSteps];
          const float scale_now[2] = {scale[0], scale[1]};
          ptx::wgmma_wait_but<1>();
          if constexpr (kLast) take();
          decode((kIndex + 1) % S::kBatches);
          if constexpr (S::kExact && kEndsGroup) {
            ptx::wgmma_wait(of_group);
#pragma unroll
            for (int i = 0; i < Tokens / 2; ++i) sums[i] = fmaf(of_group[i], scale_now[i / 2 % 2], sums[i]);
          } else if constexpr (kLast) {
            ptx::wgmma_wait(sums);
          }
        };
        x.wait_full();
        [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) __attribute__((always_inline)) {
          (run.template operator()<kIndex>(), ...);
        }(std::make_integer_sequence<int, S::kBatches>());
        release_x();
      }
      if (c.cluster == 2 && pass == 0) ptx::cluster_wait();  // the other block's barriers are there
      partial.send(sums, slice, pass);
    } else if (pass < block.passes) {
      // A last pass in which this warpgroup has no rows: the ring of x goes on.
      for (int step = 0; step < s.steps; ++step) {
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
