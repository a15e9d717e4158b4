#pragma once

#include "formats/legacy.cuh"

namespace jax_qgemm {

// w = d * q + m
struct Q4_1 : Legacy<4, 0, 0, true> {
  struct Block {
    uint16_t d, m;
    uint8_t qs[16];
  };
  static_assert(sizeof(Block) == 20);
  static constexpr const char* kName = "q4_1";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 4), group_plane("scales", 16, 32),
                                          group_plane("minimums", 16, 32)};
};

}  // namespace jax_qgemm
