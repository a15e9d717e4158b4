#pragma once

#include "formats/k_quant.cuh"

namespace jax_qgemm {

// w = d * sc * (q - 32), with an int8 sc for every 16 elements
struct Q6_K : KQuant, AffineByIndex<Q6_K> {
  struct Block {
    uint8_t ql[128], qh[64];
    int8_t scales[16];
    uint16_t d;
  };
  static_assert(sizeof(Block) == 210);
  static constexpr const char* kName = "q6_k";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 4), code_plane("high_bits", 2, 4),
                                          group_plane("sub_scales", 8, 16), group_plane("scales", 16, 256)};
  static constexpr int kGroup = 16, kLowBits = 4, kHighBits = 2, kZero = 32;
  static constexpr bool kHasMinimum = false, kSubsAreSigned = true;

  template <class Reader>
  QG_HD static AffinePair affine_at(const Reader& w, int64_t index, int64_t super_index) {
    return scaled<int8_t, 0, kZero>(w, 2, index, super_index);
  }
};

}  // namespace jax_qgemm
