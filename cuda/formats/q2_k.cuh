#pragma once

#include "formats/k_quant.cuh"

namespace jax_qgemm {

// w = d * sc * q - dmin * m, with sc the low and m the high nibble of a byte for every 16 elements
struct Q2_K : KQuant {
  struct Block {
    uint8_t scales[16], qs[64];
    uint16_t d, dmin;
  };
  static_assert(sizeof(Block) == 84);
  static constexpr const char* kName = "q2_k";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 2), group_plane("sub_scales", 8, 16),
                                          group_plane("scales", 16, 256), group_plane("minimums", 16, 256)};
  static constexpr int kGroup = 16, kLowBits = 2, kHighBits = 0;
  static constexpr bool kHasMinimum = true;

  QG_HD static AffinePair affine(const Weight& w, int64_t tile_row, int g, int64_t step) {
    const int64_t super_index = group_index(w, tile_row, g, step, 256, kKBlock);
    const auto sub = load_pair<uint8_t>(w.planes[1], group_index(w, tile_row, g, step, 16, kKBlock));
    const auto d = load_pair<uint16_t>(w.planes[2], super_index);
    const auto dmin = load_pair<uint16_t>(w.planes[3], super_index);
    AffinePair out;
    for (int h = 0; h < 2; ++h) {
      out.row[h] = {mul_rn(f16_to_f32(d.v[h]), static_cast<float>(sub.v[h] & 15)), 0,
                    -mul_rn(f16_to_f32(dmin.v[h]), static_cast<float>(sub.v[h] >> 4))};
    }
    return out;
  }
};

}  // namespace jax_qgemm
