#pragma once

#include "formats/fp4.cuh"

namespace jax_qgemm {

// w = s / 2 * table[q], with an unsigned e4m3 float s for every 16 elements
struct NVFP4 : FP4 {
  struct Block {
    uint8_t scales[4], qs[32];
  };
  static_assert(sizeof(Block) == 36);
  static constexpr const char* kName = "nvfp4";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 4), group_plane("scales", 8, 16)};
  static constexpr int kBlock = 64, kGroup = 16;

  // Half the value of the low seven bits; 0x7f alone is NaN in e4m3, and ggml decodes it as 0.
  QG_HD static float scale(uint8_t s) {
    if (s == 0x7f) return 0.0f;
    const uint32_t exponent = s >> 3 & 15u, mantissa = s & 7u;
    if (exponent == 0) return static_cast<float>(mantissa) * 0x1p-10f;
    return float_from_bits((exponent + 119u) << 23 | mantissa << 20);
  }

  QG_HD static AffinePair affine(const Weight& w, int64_t tile_row, int g, int64_t step) {
    const auto s = load_pair<uint8_t>(w.planes[1], group_index(w, tile_row, g, step, kGroup, kKBlock));
    return {{{scale(s.v[0]), kZero, 0.0f}, {scale(s.v[1]), kZero, 0.0f}}};
  }
};

}  // namespace jax_qgemm
