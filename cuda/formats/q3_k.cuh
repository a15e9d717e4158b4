#pragma once

#include "formats/k_quant.cuh"

namespace jax_qgemm {

// w = d * (sc - 32) * (q - 4), with a 6-bit sc for every 16 elements
struct Q3_K : KQuant, AffineByIndex<Q3_K> {
  struct Block {
    uint8_t hmask[32], qs[64], scales[12];
    uint16_t d;
  };
  static_assert(sizeof(Block) == 110);
  static constexpr const char* kName = "q3_k";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 2), code_plane("high_bits", 1, 2),
                                          group_plane("sub_scales", 8, 16), group_plane("scales", 16, 256)};
  static constexpr int kGroup = 16, kLowBits = 2, kHighBits = 1, kZero = 4;
  static constexpr int kSubZero = 32;
  static constexpr bool kHasMinimum = false;

  template <class Reader>
  QG_HD static AffinePair affine_at(const Reader& w, int64_t index, int64_t super_index) {
    return scaled<uint8_t, kSubZero, kZero>(w, 2, index, super_index);
  }
};

}  // namespace jax_qgemm
