#pragma once

#include "formats/iq4_table.cuh"
#include "formats/legacy.cuh"

namespace jax_qgemm {

// w = d * table[q]
struct IQ4_NL : Legacy<4, 0, kIQ4Zero> {
  struct Block {
    uint16_t d;
    uint8_t qs[16];
  };
  static_assert(sizeof(Block) == 18);
  static constexpr const char* kName = "iq4_nl";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 4), group_plane("scales", 16, 32)};
  static constexpr bool kHasTable = true;

  QG_HD static constexpr uint8_t table(int code) { return iq4_level(code); }
  QG_HD static uint32_t levels(uint32_t codes) { return table_levels<IQ4_NL>(codes); }
};

}  // namespace jax_qgemm
