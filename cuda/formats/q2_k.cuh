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
  static constexpr bool kHasMinimum = true;

  template <class Reader>
  QG_HD static AffinePair affine_at(const Reader& w, int64_t index, int64_t super_index) {
    const auto sub = w.template pair<uint8_t>(1, index);
    const auto d = w.template pair<uint16_t>(2, super_index);
    const auto dmin = w.template pair<uint16_t>(3, super_index);
    return {{{mul_rn(f16_to_f32(d.v[0]), static_cast<float>(sub.v[0] & 15)), 0,
              -mul_rn(f16_to_f32(dmin.v[0]), static_cast<float>(sub.v[0] >> 4))},
             {mul_rn(f16_to_f32(d.v[1]), static_cast<float>(sub.v[1] & 15)), 0,
              -mul_rn(f16_to_f32(dmin.v[1]), static_cast<float>(sub.v[1] >> 4))}}};
  }
};

}  // namespace jax_qgemm
