#pragma once

#include "formats/legacy.cuh"

namespace jax_qgemm {

// w = d * (q - 16)
struct Q5_0 : Legacy<4, 1, 16> {
  struct Block {
    uint16_t d;
    uint8_t qh[4], qs[16];
  };
  static_assert(sizeof(Block) == 22);
  static constexpr const char* kName = "q5_0";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 4), code_plane("high_bits", 1, 4),
                                          group_plane("scales", 16, 32)};
};

}  // namespace jax_qgemm
