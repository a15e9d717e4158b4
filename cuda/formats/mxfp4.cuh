#pragma once

#include "formats/fp4.cuh"

namespace jax_qgemm {

// w = 2^(e - 128) * table[q], with an 8-bit exponent e for every 32 elements
struct MXFP4 : FP4, AffineByIndex<MXFP4> {
  struct Block {
    uint8_t e, qs[16];
  };
  static_assert(sizeof(Block) == 17);
  static constexpr const char* kName = "mxfp4";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 4), group_plane("scales", 8, 32)};
  static constexpr int kBlock = 32, kGroup = 32;
  static constexpr bool kHasExponentScales = true;

  // 2^(e - 128), of bits (e - 1) << 23; those of e = 0 and 1, which are subnormal, are the larger ones of the two. e =
  // 255, the NaN of the format, decodes as ggml decodes it: 2^127.
  QG_HD static float scale(uint8_t e) {
    const int32_t twice = int32_t{e} << 23, normal = twice - 0x800000, subnormal = (twice >> 2) + 0x200000;
    return float_from_bits(static_cast<uint32_t>(normal > subnormal ? normal : subnormal));
  }

  template <class Reader>
  QG_HD static AffinePair affine_at(const Reader& w, int64_t index, int64_t) {
    const auto e = w.template pair<uint8_t>(1, index);
    return {{{scale(e.v[0]), kZero, 0.0f}, {scale(e.v[1]), kZero, 0.0f}}};
  }
};

}  // namespace jax_qgemm
