#pragma once

#include "formats/k_quant.cuh"

namespace jax_qgemm {

// w = d * sc * q - dmin * m, with sc the low and m the high nibble of a byte for every 16 elements
struct Q2_K : KQuant, AffineByIndex<Q2_K> {
  struct Block {
    uint8_t scales[16], qs[64];
    uint16_t d, dmin;
  };
  static_assert(sizeof(Block) == 84);
  static constexpr const char* kName = "q2_k";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 2), group_plane("sub_scales", 8, 16),
                                          group_plane("scales", 16, 256), group_plane("minimums", 16, 256)};
  static constexpr int kGroup = 16, kLowBits = 2, kHighBits = 0, kZero = 0;
  static constexpr bool kHasMinimum = true, kSubsShareBytes = true;

  template <class Reader>
  QG_HD static AffinePair affine_at(const Reader& w, int64_t index, int64_t super_index) {
    const auto d = w.template pair<uint16_t>(2, super_index);
    const auto dmin = w.template pair<uint16_t>(3, super_index);
    const auto scale = products<uint8_t, 0, 0, 15>(w, d, 1, index);
    const auto minimum = products<uint8_t, 0, 4, 15>(w, dmin, 1, index);
    return {{{scale.v[0], 0, -minimum.v[0]}, {scale.v[1], 0, -minimum.v[1]}}};
  }
};

}  // namespace jax_qgemm
