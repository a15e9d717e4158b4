#pragma once

#include "formats/k_quant.cuh"

namespace jax_qgemm {

// w = d * sc * q - dmin * m, with 6-bit sc and m for every 32 elements
struct Q4_K : KQuant, AffineByIndex<Q4_K> {
  struct Block {
    uint16_t d, dmin;
    uint8_t scales[12], qs[128];
  };
  static_assert(sizeof(Block) == 144);
  static constexpr const char* kName = "q4_k";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 4), group_plane("sub_scales", 8, 32),
                                          group_plane("sub_minimums", 8, 32), group_plane("scales", 16, 256),
                                          group_plane("minimums", 16, 256)};
  static constexpr int kGroup = 32, kLowBits = 4, kHighBits = 0, kZero = 0;
  static constexpr bool kHasMinimum = true;

  template <class Reader>
  QG_HD static AffinePair affine_at(const Reader& w, int64_t index, int64_t super_index) {
    return scaled_with_minimum(w, 1, index, super_index);
  }
};

}  // namespace jax_qgemm
