#pragma once

#include "formats/legacy.cuh"

namespace jax_qgemm {

// w = d * (q - 8)
struct Q4_0 : Legacy<4, 0, 8> {
  struct Block {
    uint16_t d;
    uint8_t qs[16];
  };
  static_assert(sizeof(Block) == 18);
  static constexpr const char* kName = "q4_0";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 4), group_plane("scales", 16, 32)};
};

}  // namespace jax_qgemm
