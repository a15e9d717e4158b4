// Sums of x over groups of k as the B operand of an mma, whose A operand are the groups' minimums.
#pragma once

#include "tile/value_operand.cuh"

namespace jax_qgemm {

// Of a stage of 128 k and as many tokens as x has there: [tile of 8 tokens][kWords][lane], a word being two bf16 of a
// token. Each sum is the sum of two bf16, 16 bits in all. Of groups of 32 the lanes' words are [high or low part][pair
// of groups], four each of a token; of groups of 16 one word has the high parts and one the low parts.
//
// All multiplied by kDown, so that no sum of finite numbers overflows, nor one of their products with minimums.
template <class T, int GroupSteps>
struct XSums {
  static constexpr int kWords = GroupSteps == 1 ? 2 : 1, kTileBytes = 128 * kWords;
  static constexpr float kDown = 0x1p-14f, kUp = 0x1p14f;

  __host__ __device__ static constexpr int bytes(int tokens) { return tokens / 8 * kTileBytes; }

  // By a warp, of two tiles of tokens, the first being tile `tile`. x: [64 k][token][64] as TMA has written it with the
  // 128-byte swizzle; x_tile_bytes: of 64 k.
  __device__ __forceinline__ static void sum(ptx::SharedAddress sums, ptx::SharedAddress x, int x_tile_bytes, int tile,
                                             int lane) {
    const int row = lane % 16;
    const ptx::SharedAddress from = x + (tile * 8 + row) * 128 + ((lane / 16) ^ (row % 8)) * 16;
    const int column = lane / 4 % (8 / GroupSteps);  // the group that the lane adds up
    float c[4] = {};                                 // of tokens lane / 4 and 8 more, two groups each
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, ptx::toggle(from + step / 4 * x_tile_bytes, step % 4 * 32));
      const uint32_t ones = column == step / GroupSteps ? (T::kIsBF16 ? 0x38803880u : 0x04000400u) : 0;  // kDown
      mma<T>(c, a, ones, ones);
    }
    const ptx::SharedAddress to = sums + tile * kTileBytes + lane * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      using B = Packed<MmaBF16>;
      const B high = B::of(c[2 * i], c[2 * i + 1]);
      const B low = B::of(c[2 * i] - high.first(), c[2 * i + 1] - high.second());
      if constexpr (kWords == 2) {
        ptx::store_shared(to + i * 256, high.bits);
        ptx::store_shared(to + i * 256 + 128, low.bits);
      } else {
        ptx::store_shared(to + i * 128, lane % 4 < 2 ? high.bits : low.bits);
      }
    }
  }

  // The operands of two stages, of the tile at `first` and `second`, times the minimums a.
  __device__ __forceinline__ static void multiply(float (&c)[4], const uint32_t (&a)[4], ptx::SharedAddress first,
                                                  ptx::SharedAddress second) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      uint32_t b[2];
      ptx::load_shared<1>(&b[0], first + i * 128);
      ptx::load_shared<1>(&b[1], second + i * 128);
      mma<MmaBF16>(c, a, b[0], b[1]);
    }
  }
};

}  // namespace jax_qgemm
