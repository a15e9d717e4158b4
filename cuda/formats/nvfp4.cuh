#pragma once

#include "formats/fp4.cuh"

namespace jax_qgemm {

// w = s / 2 * table[q], with an unsigned e4m3 float s for every 16 elements
struct NVFP4 : FP4, AffineByIndex<NVFP4> {
  struct Block {
    uint8_t scales[4], qs[32];
  };
  static_assert(sizeof(Block) == 36);
  static constexpr const char* kName = "nvfp4";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 4), group_plane("scales", 8, 16)};
  static constexpr int kBlock = 64, kGroup = 16;

  // Half the value of the low seven bits; 0x7f alone is NaN in e4m3, and ggml decodes it as 0.
  QG_HD static float scale(uint8_t s) {
#ifdef __CUDA_ARCH__
    // Subnormal or not, the bits are those of a float32 far below.
    return 0x1p119f * float_from_bits(s == 0x7f ? 0 : static_cast<uint32_t>(s & 0x7f) << 20);
#else
    const uint32_t magnitude = s & 0x7fu;
    const float subnormal = static_cast<float>(magnitude) * 0x1p-10f;
    uint32_t subnormal_bits;
    memcpy(&subnormal_bits, &subnormal, sizeof subnormal_bits);
    // Masks instead of branches, so that loops over scales vectorize.
    const uint32_t is_subnormal = 0u - (magnitude < 8), is_number = 0u - (s != 0x7f);
    const uint32_t normal = (magnitude << 20) + (119u << 23);
    return float_from_bits(is_number & ((is_subnormal & subnormal_bits) | (~is_subnormal & normal)));
#endif
  }

  template <class Reader>
  QG_HD static AffinePair affine_at(const Reader& w, int64_t index, int64_t) {
    const auto s = w.template pair<uint8_t>(1, index);
    return {{{scale(s.v[0]), kZero, 0.0f}, {scale(s.v[1]), kZero, 0.0f}}};
  }
};

}  // namespace jax_qgemm
