// ggml's k-quants: super-blocks of 256 with float16 scales, whose groups of 16 or 32 have small integer scales of their
// own.
#pragma once

#include <cmath>

#include "formats/format.cuh"

namespace jax_qgemm {

struct KQuant {
  static constexpr int kBlock = 256, kKBlock = 256;
  static constexpr bool kHasTable = false;
  // Sub-scales, the first group plane: what they are biased by, whether they are int8, and whether they are the low
  // four bits of bytes whose high ones are the sub-minimums.
  static constexpr int kSubZero = 0;
  static constexpr bool kSubsAreSigned = false, kSubsShareBytes = false;

  template <class T>
  QG_HD static T levels(T codes) {
    return codes;
  }

 protected:
  // d * (sub - SubZero) for the pair at `index` of a plane of 8-bit subs, of which the bits of Mask from bit Shift up
  // count; exact either way.
  template <class Sub, int SubZero, int Shift = 0, int Mask = 255, class Reader>
  QG_HD static Pair<float> products(const Reader& w, const Pair<uint16_t>& d, int plane, int64_t index) {
    constexpr int kFlip = Sub(-1) < 0 ? 128 : 0;  // makes a signed byte an unsigned one that is 128 more
    Pair<float> out;
    if constexpr (requires { w.template biased_bytes<Shift, Mask, kFlip>(plane, index); }) {
      constexpr float kBias = 32768 + kFlip + SubZero;
      const auto sub = w.template biased_bytes<Shift, Mask, kFlip>(plane, static_cast<int>(index));
      for (int h = 0; h < 2; ++h) {
        const float scale = f16_to_f32(d.v[h]);
        out.v[h] = fmaf(scale, sub.v[h], -kBias * scale);
      }
    } else {
      const auto sub = w.template pair<Sub>(plane, index);
      for (int h = 0; h < 2; ++h) {
        out.v[h] = mul_rn(f16_to_f32(d.v[h]), static_cast<float>((sub.v[h] >> Shift & (Mask | -kFlip)) - SubZero));
      }
    }
    return out;
  }

  // Formats with one float16 scale: scale = d * (sub - SubZero), sub as Sub reads it.
  template <class Sub, int SubZero, int Zero, class Reader>
  QG_HD static AffinePair scaled(const Reader& w, int first_plane, int64_t index, int64_t super_index) {
    const auto d = w.template pair<uint16_t>(first_plane + 1, super_index);
    const auto scale = products<Sub, SubZero>(w, d, first_plane, index);
    return {{{scale.v[0], Zero, 0.0f}, {scale.v[1], Zero, 0.0f}}};
  }

  // Formats with a scale and a minimum: scale = d * sub, minimum = -(dmin * sub_minimum), a byte each.
  template <class Reader>
  QG_HD static AffinePair scaled_with_minimum(const Reader& w, int first_plane, int64_t index, int64_t super_index) {
    const auto d = w.template pair<uint16_t>(first_plane + 2, super_index);
    const auto dmin = w.template pair<uint16_t>(first_plane + 3, super_index);
    const auto scale = products<uint8_t, 0>(w, d, first_plane, index);
    const auto minimum = products<uint8_t, 0>(w, dmin, first_plane + 1, index);
    return {{{scale.v[0], 0, -minimum.v[0]}, {scale.v[1], 0, -minimum.v[1]}}};
  }
};

}  // namespace jax_qgemm
