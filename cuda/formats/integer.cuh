// int2, int3, int4 and int8 with one scale per group or per channel; group, scale type and zero points are run-time
// values.
#pragma once

#include "formats/format.cuh"

namespace jax_qgemm {

// w = scale * (q - zero_point). Levels are unsigned in every case: a symmetric format's zero point is the middle.
template <int Bits>
struct Integer : AffineByIndex<Integer<Bits>> {
  static constexpr int kBlock = 0, kKBlock = 0, kGroup = 0;
  static constexpr int kLowBits = Bits == 3 ? 2 : Bits, kHighBits = Bits == 3 ? 1 : 0;
  static constexpr bool kHasMinimum = false, kHasTable = false;
  static constexpr int kScales = kHighBits ? 2 : 1, kZero = 1 << (Bits - 1);

  template <class T>
  QG_HD static T levels(T codes) {
    return Bits == 8 ? codes ^ 0x80808080u : codes;
  }

  template <class Reader>
  QG_HD static AffinePair affine_at(const Reader& w, int64_t index, int64_t) {
    float scale[2];
    if (w.scale_type == ScaleType::kF32) {
      const auto bits = w.template pair<uint32_t>(kScales, index);
      for (int h = 0; h < 2; ++h) scale[h] = float_from_bits(bits.v[h]);
    } else {
      const auto bits = w.template pair<uint16_t>(kScales, index);
      for (int h = 0; h < 2; ++h) {
        scale[h] = w.scale_type == ScaleType::kF16 ? f16_to_f32(bits.v[h]) : bf16_to_f32(bits.v[h]);
      }
    }
    int zero[2] = {kZero, kZero};
    if (w.has_plane(kScales + 1)) {
      const auto stored = w.template pair<uint8_t>(kScales + 1, index);
      for (int h = 0; h < 2; ++h) zero[h] = stored.v[h];
    }
    return {{{scale[0], zero[0], 0.0f}, {scale[1], zero[1], 0.0f}}};
  }
};

// The plane tables at the default parameters: groups of 128, float16 scales, symmetric.
struct Int2 : Integer<2> {
  static constexpr const char* kName = "int2";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 2), group_plane("scales", 16, 128)};
};

struct Int3 : Integer<3> {
  static constexpr const char* kName = "int3";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 2), code_plane("high_bits", 1, 2),
                                          group_plane("scales", 16, 128)};
};

struct Int4 : Integer<4> {
  static constexpr const char* kName = "int4";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 4), group_plane("scales", 16, 128)};
};

struct Int8 : Integer<8> {
  static constexpr const char* kName = "int8";
  static constexpr PlaneSpec kPlanes[] = {code_plane("codes", 8), group_plane("scales", 16, 128)};
};

}  // namespace jax_qgemm
