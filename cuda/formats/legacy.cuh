// ggml's formats of 32-element blocks with one float16 scale and perhaps a float16 minimum.
#pragma once

#include "formats/format.cuh"

namespace jax_qgemm {

template <int LowBits, int HighBits, int Zero, bool HasMinimum = false>
struct Legacy : AffineByIndex<Legacy<LowBits, HighBits, Zero, HasMinimum>> {
  static constexpr int kBlock = 32, kKBlock = 64, kGroup = 32;
  static constexpr int kLowBits = LowBits, kHighBits = HighBits, kZero = Zero;
  static constexpr bool kHasMinimum = HasMinimum, kHasTable = false;

  template <class T>
  QG_HD static T levels(T codes) {
    return codes;
  }

  template <class Reader>
  QG_HD static AffinePair affine_at(const Reader& w, int64_t index, int64_t) {
    constexpr int kScales = HighBits ? 2 : 1;
    const auto d = w.template pair<uint16_t>(kScales, index);
    Pair<uint16_t> m{};
    if constexpr (HasMinimum) m = w.template pair<uint16_t>(kScales + 1, index);
    return {{{f16_to_f32(d.v[0]), Zero, f16_to_f32(m.v[0])}, {f16_to_f32(d.v[1]), Zero, f16_to_f32(m.v[1])}}};
  }
};

}  // namespace jax_qgemm
