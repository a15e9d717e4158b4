// q8_1: the activations' format, x = d * q. It has no planes; the block is ggml's, for interchange. What s holds
// depends on who wrote it (jax_qgemm/formats/activations.py), so decoding does not read it.
#pragma once

#include "formats/format.cuh"

namespace jax_qgemm {

struct Q8_1 {
  static constexpr int kBlock = 32;

  struct Block {
    uint16_t d, s;
    int8_t qs[kBlock];
  };
  static_assert(sizeof(Block) == 36);

  QG_HD static float value(const Block& block, int i) {
    return mul_rn(f16_to_f32(block.d), static_cast<float>(block.qs[i]));
  }
};

}  // namespace jax_qgemm
