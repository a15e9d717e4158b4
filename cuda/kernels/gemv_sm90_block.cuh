// How a thread block of gemv_sm90 keeps what it reads, and the warps that have it brought.
#pragma once

#include <type_traits>

#include "kernels/gemv_sm90_config.cuh"
#include "tile/affine_stage.cuh"
#include "tile/partial_sums.cuh"
#include "tile/plane_boxes.cuh"
#include "tile/slot_ring.cuh"
#include "tile/stage_copier.cuh"
#include "tile/super_block.cuh"
#include "tile/x_sums.cuh"

namespace jax_qgemm {

// Whether the operand is the integer or the 4-bit float itself, and sums are multiplied by the scale: of integer
// formats, where a scale serves whole tiles, weights are not rounded then; and where float16 does not hold the scales.
template <class F, class T, class G>
constexpr bool kGemvSm90Exact = F::kGroup == 0 ? G::kSteps >= 4 : !T::kIsBF16 && !kScalesFitF16<F>;

// Whether the operand is a sub-scale times a level, and sums of a super-block are multiplied by its scale. Minimums are
// multiplied by sums of x then, one for each group.
template <class F>
constexpr bool kGemvSm90Super = F::kKBlock == 256;
template <class F>
constexpr bool kGemvSm90SumsX = kGemvSm90Super<F> && F::kHasMinimum;

// Of sums of x over groups, a stage.
template <class F>
constexpr int gemv_sm90_sum_bytes(int tokens) {
  if constexpr (kGemvSm90SumsX<F>) return XSums<MmaF16, F::kGroup / 16>::bytes(tokens);
  return 0;
}

template <class F, class G>
using GemvSm90Staged = StagedWeight<F, kGemvSm90Stage / kTileK, std::min(G::kSteps, 4), kGemvSm90Rows / kTileN>;

template <class F, class T, int Tokens, class G>
struct GemvSm90 {
  using Staged = GemvSm90Staged<F, G>;
  static constexpr int kTiles = kGemvSm90Stage / kTileK;
  // A slot of x holds [tile of k][token][64].
  static constexpr int kXTileBytes = Tokens * kTileK * 2, kXBytes = kTiles * kXTileBytes;
  static constexpr bool kSuper = kGemvSm90Super<F>, kSumsX = kGemvSm90SumsX<F>;
  static constexpr bool kExact = kGemvSm90Exact<F, T, G>, kScalesSums = kExact || kSuper;
  // A unit is what shares a scale, or a stage: stages and k-steps of it.
  static constexpr int kStages = kSuper ? 2 : 1, kSteps = kStages * kTiles * 4;
  static constexpr int kSpan = kSuper ? kSteps : G::kSteps;  // k-steps that are summed before they are scaled
  // k-steps whose operands are made at a time, and how many times that is of a stage. Registers are few.
  static constexpr int kBatch = Tokens == 64 || (kExact && G::kSteps == 2) ? 2 : 4, kBatches = kTiles * 4 / kBatch;
  // Whether a stage's second tile is read only when the first one has been decoded. Registers are few.
  static constexpr bool kTakesLate = kSuper && Tokens == 64;
  using XSums = jax_qgemm::XSums<T, G::kSteps>;
  using Weights = typename decltype([] {
    if constexpr (kSuper) {
      return std::type_identity<SuperBlock<F, T, Staged>>();
    } else {
      return std::type_identity<AffineStage<F, ValueOperand<F, T, kExact, true>, Staged, kTiles, G::kSteps>>();
    }
  }())::type;
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
  // Sums of x over groups, of a slot of x: where they lie, and the barrier that says that they are there.
  __device__ __forceinline__ ptx::SharedAddress x_sums(int slice, int slot) const {
    return ptx::shared_address(shared + s.x_sums) + (slice * s.config.slots + slot) * s.sum_bytes;
  }
  __device__ __forceinline__ uint64_t* x_summed(int slice) const {
    const GemvSm90Config& c = s.config;
    return barriers() + 2 * (c.slices * c.slots + c.warpgroups() * c.depth + c.buffers * c.rows) + slice * c.slots;
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
    if constexpr (kSumsX) {
      constexpr int kArrivals = Tokens / 16 * 32;  // of every lane: each has written its own
      for (int i = 0; producer < c.slices && i < c.slots; ++i) ptx::barrier_init(x_summed(producer) + i, kArrivals);
    }
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

}  // namespace jax_qgemm
