// ggml's formats of 32-element blocks with one float16 scale and perhaps a float16 minimum.
#pragma once

#include "formats/format.cuh"

namespace jax_qgemm {

template <int LowBits, int HighBits, int Zero, bool HasMinimum = false>
struct Legacy {
  static constexpr int kBlock = 32, kKBlock = 64, kGroup = 32;
  static constexpr int kLowBits = LowBits, kHighBits = HighBits;
  static constexpr bool kHasMinimum = HasMinimum, kHasTable = false;

  QG_HD static uint32_t levels(uint32_t codes) { return codes; }

  QG_HD static AffinePair affine(const Weight& w, int64_t tile_row, int g, int64_t step) {
    constexpr int kScales = HighBits ? 2 : 1;
    const int64_t index = group_index(w, tile_row, g, step, kGroup, kKBlock);
    const auto d = load_pair<uint16_t>(w.planes[kScales], index);
    Pair<uint16_t> m{};
    if constexpr (HasMinimum) m = load_pair<uint16_t>(w.planes[kScales + 1], index);
    return {{{f16_to_f32(d.v[0]), Zero, f16_to_f32(m.v[0])}, {f16_to_f32(d.v[1]), Zero, f16_to_f32(m.v[1])}}};
  }
};

}  // namespace jax_qgemm
