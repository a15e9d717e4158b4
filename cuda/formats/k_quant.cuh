// ggml's k-quants: super-blocks of 256 with float16 scales, whose groups of 16 or 32 have small integer scales of their own.
#pragma once

#include "formats/format.cuh"

namespace jax_qgemm {

struct KQuant {
  static constexpr int kBlock = 256, kKBlock = 256;
  static constexpr bool kHasTable = false;

  QG_HD static uint32_t levels(uint32_t codes) { return codes; }

 protected:
  // Formats with one float16 scale: scale = d * (sub - SubZero), sub as Sub reads it.
  template <class Sub, int SubZero, int Zero, int Group>
  QG_HD static AffinePair scaled(const Weight& w, int first_plane, int64_t tile_row, int g, int64_t step) {
    const auto sub = load_pair<Sub>(w.planes[first_plane], group_index(w, tile_row, g, step, Group, kKBlock));
    const auto d = load_pair<uint16_t>(w.planes[first_plane + 1], group_index(w, tile_row, g, step, 256, kKBlock));
    return {{{mul_rn(f16_to_f32(d.v[0]), static_cast<float>(sub.v[0] - SubZero)), Zero, 0.0f},
             {mul_rn(f16_to_f32(d.v[1]), static_cast<float>(sub.v[1] - SubZero)), Zero, 0.0f}}};
  }

  // Formats with a scale and a minimum: scale = d * sub, minimum = -(dmin * sub_minimum), a byte each.
  QG_HD static AffinePair scaled_with_minimum(const Weight& w, int first_plane, int64_t tile_row, int g, int64_t step) {
    const int64_t index = group_index(w, tile_row, g, step, 32, kKBlock);
    const int64_t super_index = group_index(w, tile_row, g, step, 256, kKBlock);
    const auto sub = load_pair<uint8_t>(w.planes[first_plane], index);
    const auto sub_minimum = load_pair<uint8_t>(w.planes[first_plane + 1], index);
    const auto d = load_pair<uint16_t>(w.planes[first_plane + 2], super_index);
    const auto dmin = load_pair<uint16_t>(w.planes[first_plane + 3], super_index);
    AffinePair out;
    for (int h = 0; h < 2; ++h) {
      out.row[h] = {mul_rn(f16_to_f32(d.v[h]), static_cast<float>(sub.v[h])), 0,
                    -mul_rn(f16_to_f32(dmin.v[h]), static_cast<float>(sub_minimum.v[h]))};
    }
    return out;
  }
};

}  // namespace jax_qgemm
