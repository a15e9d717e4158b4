// q8_1: the activations' format. It has no planes and no kernel of its own; the block is for interchange.
#pragma once

#include "formats/format.cuh"

namespace jax_qgemm {

struct Q8_1 {
  struct Block {
    uint16_t d, s;
    int8_t qs[32];
  };
  static_assert(sizeof(Block) == 36);
};

}  // namespace jax_qgemm
