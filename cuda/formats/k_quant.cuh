// ggml's k-quants: super-blocks of 256 with float16 scales, whose groups of 16 or 32 have small integer scales of their
// own.
#pragma once

#include "formats/format.cuh"

namespace jax_qgemm {

struct KQuant {
  static constexpr int kBlock = 256, kKBlock = 256;
  static constexpr bool kHasTable = false;

  template <class T>
  QG_HD static T levels(T codes) {
    return codes;
  }

 protected:
  // Formats with one float16 scale: scale = d * (sub - SubZero), sub as Sub reads it.
  template <class Sub, int SubZero, int Zero, class Reader>
  QG_HD static AffinePair scaled(const Reader& w, int first_plane, int64_t index, int64_t super_index) {
    const auto sub = w.template pair<Sub>(first_plane, index);
    const auto d = w.template pair<uint16_t>(first_plane + 1, super_index);
    return {{{mul_rn(f16_to_f32(d.v[0]), static_cast<float>(sub.v[0] - SubZero)), Zero, 0.0f},
             {mul_rn(f16_to_f32(d.v[1]), static_cast<float>(sub.v[1] - SubZero)), Zero, 0.0f}}};
  }

  // Formats with a scale and a minimum: scale = d * sub, minimum = -(dmin * sub_minimum), a byte each.
  template <class Reader>
  QG_HD static AffinePair scaled_with_minimum(const Reader& w, int first_plane, int64_t index, int64_t super_index) {
    const auto sub = w.template pair<uint8_t>(first_plane, index);
    const auto sub_minimum = w.template pair<uint8_t>(first_plane + 1, index);
    const auto d = w.template pair<uint16_t>(first_plane + 2, super_index);
    const auto dmin = w.template pair<uint16_t>(first_plane + 3, super_index);
    return {{{mul_rn(f16_to_f32(d.v[0]), static_cast<float>(sub.v[0])), 0,
              -mul_rn(f16_to_f32(dmin.v[0]), static_cast<float>(sub_minimum.v[0]))},
             {mul_rn(f16_to_f32(d.v[1]), static_cast<float>(sub.v[1])), 0,
              -mul_rn(f16_to_f32(dmin.v[1]), static_cast<float>(sub_minimum.v[1]))}}};
  }
};

}  // namespace jax_qgemm
