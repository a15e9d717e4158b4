#pragma once

#include "formats/legacy.cuh"

namespace jax_qgemm {

// w = d * q, q signed
struct Q8_0 : Legacy<8, 0, 128> {
  struct Block {
    uint16_t d;
    int8_t qs[32];
  };
  static_assert(sizeof(Block) == 34);
  static constexpr const char* kName = "q8_0";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 8), group_plane("scales", 16, 32)};

  template <class T>
  QG_HD static T levels(T codes) {
    return codes ^ 0x80808080u;
  }
};

}  // namespace jax_qgemm
