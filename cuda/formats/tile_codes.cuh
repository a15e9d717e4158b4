// Reading codes out of the planes of a tile.
#pragma once

#include "formats/format.cuh"

namespace jax_qgemm {

template <class F>
QG_HD int64_t k_block_of(const Weight& w) {
  if constexpr (F::kKBlock != 0) return F::kKBlock;
  return w.group < kTileK ? kTileK : w.group;
}

template <class F>
QG_HD int group_of(const Weight& w) {
  return F::kGroup ? F::kGroup : w.group;
}

// Whether float16 holds the scales: powers of two from 2^-127 are beyond it, as bf16 and float32 may be.
template <class F>
constexpr bool kScalesFitF16 = !requires { F::kHasExponentScales; };
template <class F>
QG_HD bool scales_fit_f16(const Weight& w) {
  return F::kGroup == 0 ? w.scale_type == ScaleType::kF16 : kScalesFitF16<F>;
}

// Bits of a stored weight, per-group values included.
template <class F>
double stored_bits(const Weight& w) {
  double bits = 0;
  for (const PlaneSpec& plane : F::kPlanes) {
    const int group = F::kGroup ? plane.group : w.group;
    if (plane.code) {
      bits += plane.bits;
    } else if (group) {
      bits += static_cast<double>(plane.bits) / group;
    }
  }
  return bits;
}

// Where word `word` of lane `lane` lies in a tile of a plane of Bits bits.
template <int Bits>
QG_HD int word_offset(int lane, int word) {
  constexpr int kVector = Bits < 4 ? Bits : 4;
  return word / kVector * (32 * kVector) + lane * kVector + word % kVector;
}

// One run (four codes of a row, a byte each) of one plane.
template <int Bits>
QG_HD uint32_t plane_run(const void* plane, int64_t tile, int lane, int run) {
  constexpr int kFields = 8 / Bits;
  constexpr uint32_t kMask = 0x01010101u * ((1u << Bits) - 1);
  const auto* words = static_cast<const uint32_t*>(plane) + tile * (32 * Bits);
  return words[word_offset<Bits>(lane, run / kFields)] >> (Bits * (run % kFields)) & kMask;
}

// One run of whole codes. `tile` counts 16 x 64 tiles, k fastest.
template <class F>
QG_HD uint32_t run_codes(const Weight& w, int64_t tile, int lane, int run) {
  uint32_t codes = plane_run<F::kLowBits>(w.planes[0], tile, lane, run);
  if constexpr (F::kHighBits != 0) codes |= plane_run<F::kHighBits>(w.planes[1], tile, lane, run) << F::kLowBits;
  return codes;
}

}  // namespace jax_qgemm
