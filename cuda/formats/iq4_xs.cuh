#pragma once

#include "formats/iq4_table.cuh"
#include "formats/k_quant.cuh"

namespace jax_qgemm {

// w = d * (sc - 32) * table[q], with a 6-bit sc for every 32 elements
struct IQ4_XS : KQuant, AffineByIndex<IQ4_XS> {
  struct Block {
    uint16_t d, scales_h;
    uint8_t scales_l[4], qs[128];
  };
  static_assert(sizeof(Block) == 136);
  static constexpr const char* kName = "iq4_xs";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 4), group_plane("sub_scales", 8, 32),
                                          group_plane("scales", 16, 256)};
  static constexpr int kGroup = 32, kLowBits = 4, kHighBits = 0, kZero = kIQ4Zero;
  static constexpr int kSubZero = 32;
  static constexpr bool kHasMinimum = false, kHasTable = true;

  QG_HD static constexpr uint8_t table(int code) { return iq4_level(code); }
  QG_HD static uint32_t levels(uint32_t codes) { return table_levels<IQ4_XS>(codes); }

  template <class Reader>
  QG_HD static AffinePair affine_at(const Reader& w, int64_t index, int64_t super_index) {
    return scaled<uint8_t, kSubZero, kZero>(w, 1, index, super_index);
  }
};

}  // namespace jax_qgemm
